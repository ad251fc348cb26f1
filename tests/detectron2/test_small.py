"""The small profile in Detectron2, in both kinds of config."""

import pytest

pytest.importorskip(
    "detectron2.modeling",
    reason="needs Detectron2, which has no release on the index: docs/detectron2.md says how to"
    " install it",
)

import torch
from detectron2.config import get_cfg
from detectron2_models import CONFIGS, pictures, training_step
from lite0 import use_random_weights
from prepared import prepare_detectron2

from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.detectron2.small import Lite0
from polyfocal.efficientnet import EfficientNetLite0
from polyfocal.errors import UserError

NAMES = [
    f"{name}.{kind}" for name in ("retinanet_poly1", "mask_rcnn_poly1") for kind in ("py", "yaml")
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    settings = DigitScenes(num_train=4, num_val=2, size=64, digits=(1, 2), digit_size=(20, 40))
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", settings)


@pytest.fixture(autouse=True)
def weights(monkeypatch, tmp_path):
    return use_random_weights(monkeypatch, tmp_path)


@pytest.mark.parametrize("name", [*NAMES, "fcos_poly1.py"])
def test_takes_a_step_and_predicts(name, scenes, weights):
    experiment = prepare_detectron2(CONFIGS / name, data=scenes, profile="small")
    torch.manual_seed(0)
    model = experiment.build_model()
    net = model.backbone.bottom_up.net
    assert isinstance(net, EfficientNetLite0)
    stem = torch.load(weights, weights_only=True)["_conv_stem.weight"]
    assert torch.equal(net.stem[0].conv.weight, stem)
    assert model.pixel_mean.flatten().tolist() == model.pixel_std.flatten().tolist() == [127.5] * 3
    assert getattr(model, "input_format", "RGB") == "RGB"  # FCOS has none
    if name.endswith(".py"):
        formats = [
            loader.mapper.image_format
            for loader in experiment.cfg.dataloader.values()
            if "mapper" in loader
        ]
        assert formats == ["RGB", "RGB"]

    losses, gradients, _ = training_step(model, pictures())
    assert all(value.isfinite() for value in losses.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == gradients.keys()
    assert {n.split(".net.")[1][:8] for n in gradients if ".net." in n} == {"stages.2", "stages.3"}
    optimizer = experiment.build_optimizer(model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {n: rates[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert {r for n, r in of.items() if n.startswith("backbone.bottom_up.")} == {1e-4}
    assert {r for n, r in of.items() if not n.startswith("backbone.bottom_up.")} == {1e-3}
    with torch.no_grad():
        (result, _) = model.eval()([{"image": p["image"]} for p in pictures()])
    assert result["instances"].pred_boxes.tensor.isfinite().all()
    assert "lite0" in experiment.dump().lower()


def test_the_rate_follows_an_override(scenes):
    option = ["optimizer.lr=0.002"]
    path = CONFIGS / "retinanet_poly1.py"
    experiment = prepare_detectron2(path, data=scenes, profile="small", options=option)
    optimizer = experiment.build_optimizer(experiment.build_model())
    assert {group["lr"] for group in optimizer.param_groups} == {0.002, 0.0002}


def test_features_have_the_names_and_strides_of_a_resnet():
    net = Lite0(["res3", "res5"])
    found = net(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        "res3": (1, 40, 8, 12),
        "res5": (1, 320, 2, 3),
    }
    shapes = net.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "res3": (40, 8),
        "res5": (320, 32),
    }


def test_another_pyramid_is_refused(tmp_path, scenes):
    config = tmp_path / "mine.yaml"
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_my_resnet_fpn_backbone"
    config.write_text(cfg.dump())
    with pytest.raises(UserError, match="makes the backbone EfficientNet-Lite0 with FPN"):
        prepare_detectron2(config, data=scenes, profile="small")
