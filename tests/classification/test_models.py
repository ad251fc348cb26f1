"""The classifier: its network, what it does to pictures, and every loss in it."""

import pytest

pytest.importorskip("mmengine", reason="needs MMEngine: pip install 'polyfocal[mmdet]'")

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement

from polyfocal.classification import CifarResNet, ImagePreprocessor
from polyfocal.errors import UserError

SOFTMAX = {"use_sigmoid": False}
COUNTS = {"class_counts": [50, 20, 5]}
COLOUR = {"type": "polyfocal.BiasHead", "num_classes": 3, "sees": "colour"}
SHALLOW = {"type": "polyfocal.BiasHead", "num_classes": 3, "sees": "features", "in_channels": 16}
LOSSES = [
    {"type": "FocalLoss", **SOFTMAX, "alpha": None},
    {"type": "CyclicalFocalLoss", **SOFTMAX},
    {"type": "Poly1CrossEntropyLoss", "epsilon": 1.0},
    {"type": "PolyNLoss", **SOFTMAX, "epsilons": (1.0, 0.5)},
    {"type": "NoisedTopKLoss", "k": 1, "epsilon": 0.1},
    {"type": "ImbalancedNoisedTopKLoss", "k": 1, "epsilon": 0.1, "max_margin": 0.2, **COUNTS},
    {"type": "LDAMLoss", **COUNTS},
    {"type": "DualFocalLoss", **SOFTMAX, "gamma": 2.0},
    {"type": "DebiasedFocalLoss", **SOFTMAX, "bias": COLOUR},
    {"type": "ProductOfExpertsLoss", **SOFTMAX, "bias": SHALLOW},
    {"type": "ReweightedCrossEntropyLoss", **SOFTMAX, "bias": COLOUR},
    {"type": "ConfidenceRegularizationLoss", **SOFTMAX, "bias": COLOUR, "teacher": SHALLOW},
]


def classifier(loss, **settings):
    return MODELS.build(
        {
            "type": "polyfocal.Classifier",
            "data_preprocessor": {"type": "polyfocal.ImagePreprocessor"},
            "backbone": {"type": "polyfocal.CifarResNet", "depth": 8, "base_channels": 4},
            "in_channels": 16,
            "num_classes": 3,
            "loss": {**loss, "type": f"polyfocal.{loss['type']}"},
            **settings,
        }
    )


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    samples = [BaseDataElement(metainfo={"sample_idx": i, "label": i % 3}) for i in range(6)]
    return {"inputs": list(images), "data_samples": samples}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["type"])
def test_every_loss_trains(loss, monkeypatch):
    torch.manual_seed(0)
    hub = MessageHub.get_current_instance()
    monkeypatch.setitem(hub.runtime_info, "iter", 0)
    monkeypatch.setitem(hub.runtime_info, "max_iters", 10)
    model = classifier(loss, normalized="class_counts" in loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(8):
        value = model(**model.data_preprocessor(batch(), True), mode="loss")["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert min(values[-3:]) < values[0]
    model.eval()
    predictions = model.val_step(batch())
    scores = torch.stack([sample.scores for sample in predictions])
    assert scores.shape == (6, 3) and torch.allclose(scores.sum(1), torch.ones(6))
    assert [sample.label for sample in predictions] == [0, 1, 2, 0, 1, 2]
    logits = model(model.data_preprocessor(batch())["inputs"])
    assert (scores.argmax(1) == logits.argmax(1)).all()


def test_cosines():
    model = classifier(LOSSES[0], normalized=True).eval()
    inputs = model.data_preprocessor(batch())["inputs"]
    features = model.backbone(inputs).mean(dim=(2, 3))
    expected = F.cosine_similarity(features[:, None], model.head.weight[None], dim=2)
    torch.testing.assert_close(model(inputs), expected)


def test_mmdets_resnet():
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    resnet = {"type": "mmdet.ResNet", "depth": 18, "base_channels": 8, "norm_eval": False}
    model = classifier(LOSSES[0], backbone=resnet, in_channels=64)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ({"type": "FocalLoss", "use_sigmoid": True}, "expected a loss of polyfocal with use_sig"),
        ({"type": "LDAMLoss", "class_counts": [1, 1], "m": 2}, "has no keyword 'm'"),
    ],
)
def test_refused_losses(loss, sentence):
    with pytest.raises((UserError, TypeError), match=sentence):
        classifier(loss)


def test_network_of_the_paper():
    """Parameters of He et al.'s table 6: 0.27 M with 20 layers, 0.46 M with 32, 0.85 M with 56."""
    for depth, millions in ((20, 0.27), (32, 0.46), (56, 0.85)):
        model = CifarResNet(depth)
        count = sum(p.numel() for p in model.parameters()) + 65 * 10
        assert count / 1e6 == pytest.approx(millions, abs=0.01)
    assert CifarResNet(8)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)
    with pytest.raises(UserError, match="depth=18"):
        CifarResNet(18)


def test_pictures_are_normalised_and_moved():
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    data = batch()
    images = torch.stack(data["inputs"]).float()
    still = ImagePreprocessor(mean, std, padding=2, flip=True)(data, training=False)["inputs"]
    wanted = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(still, wanted)
    torch.manual_seed(0)
    moved = ImagePreprocessor(padding=2, flip=True)(data, training=True)["inputs"] * 255
    padded = F.pad(images, [2] * 4)
    seen = set()
    for found, picture in zip(moved, padded, strict=True):
        places = [
            (top, left, flipped)
            for flipped in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.allclose(
                found.flip(2) if flipped else found, picture[:, top : top + 8, left : left + 8]
            )
        ]
        assert len(places) == 1, "each is one window of the padded picture, maybe mirrored"
        seen.add(places[0])
    assert len(seen) > 3 and len({flipped for *_, flipped in seen}) == 2
