"""Bias heads in real detectors: they see what they should, and nothing of them leaks out."""

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.registry import MODELS
from mmdet_models import batch, tiny_model
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import nn

from polyfocal.losses import BiasHead
from polyfocal.mmdet import BiasHeadHook, attach_bias_heads

NAMES = (
    "DebiasedFocalLoss",
    "ProductOfExpertsLoss",
    "ReweightedCrossEntropyLoss",
    "ConfidenceRegularizationLoss",
)


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def config(kind, detector, sees="colour", **bias):
    dense = detector in ("retina", "fcos", "atss")
    head = dict(type="polyfocal.BiasHead", num_classes=3, sees=sees, background=not dense, **bias)
    if detector == "retina":
        head["num_anchors"] = 9
    loss = dict(type=f"polyfocal.{kind}", use_sigmoid=dense, bias=head)
    if kind == "ConfidenceRegularizationLoss":
        loss["teacher"] = dict(head, sees="features", in_channels=256)
    return loss


def train_once(model):
    inputs, samples = batch(model)
    model.train()
    torch.manual_seed(2)
    losses = model.loss(inputs, samples)
    total = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k)
    total.backward()
    return total, losses


@pytest.mark.parametrize("detector", ["retina", "faster"])
@pytest.mark.parametrize("kind", NAMES)
def test_every_debiasing_loss_trains_in_a_real_detector(kind, detector):
    model = tiny_model(detector, config(kind, detector))
    handles = attach_bias_heads(model)
    total, _ = train_once(model)
    assert total.isfinite()
    classifier = (
        model.bbox_head.retina_cls if detector == "retina" else model.roi_head.bbox_head.fc_cls
    )
    assert classifier.weight.grad.abs().sum() > 0
    heads = [module for module in model.modules() if isinstance(module, BiasHead)]
    assert len(heads) == (2 if kind.startswith("Conf") else 1)
    for head in heads:
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
    for handle in handles:
        handle.remove()
    inputs, samples = batch(model)
    model.eval()
    with torch.no_grad():
        model.predict(inputs, samples)  # no trace of the bias at test time


@pytest.mark.parametrize(
    ("detector", "sees"),
    [
        ("retina", "colour"),
        ("retina", "geometry"),
        ("retina", "features"),
        ("fcos", "geometry"),
        ("atss", "colour"),
        ("faster", "colour"),
        ("faster", "features"),
        ("cascade", "geometry"),
    ],
)
def test_gradients_of_a_bias_head_stay_in_it(detector, sees):
    extra = dict(in_channels=256) if sees == "features" else {}
    model = tiny_model(detector, config("ReweightedCrossEntropyLoss", detector, sees, **extra))
    attach_bias_heads(model)
    heads = [module for module in model.modules() if isinstance(module, BiasHead)]
    offered = []
    for head in heads:
        head.register_forward_hook(lambda module, args, output: offered.append(output))
    train_once(model)
    assert offered and all(logits.requires_grad for logits in offered)
    model.zero_grad()
    inputs, samples = batch(model)
    offered.clear()
    model.loss(inputs, samples)
    sum(logits.square().sum() for logits in offered).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(".bias.layers." in name for name in touched)


def test_colour_is_that_under_each_anchor_cell_and_box():
    # One red picture and one green one, the right half of each black.
    for detector, kind in (("retina", "ProductOfExpertsLoss"), ("faster", "ProductOfExpertsLoss")):
        model = tiny_model(detector, config(kind, detector))
        attach_bias_heads(model)
        seen = []
        head = next(module for module in model.modules() if isinstance(module, BiasHead))
        classify = head.classify
        head.classify = lambda features: seen.append(features) or classify(features)  # noqa: B023
        inputs, samples = batch(model)
        pictures = torch.zeros_like(inputs)
        half = inputs.shape[-1] // 2
        pictures[0, 0, :, :half] = 1.0
        pictures[1, 1, :, :half] = 1.0
        model.train()
        model.loss(pictures, samples)
        if detector == "retina":
            first = seen[0].reshape(2, -1, 6)  # level with stride 8, all of 96 / 8 squared cells
            side = inputs.shape[-1] // 8
            grid = first.reshape(2, side, side, 6)
            torch.testing.assert_close(
                grid[0, :, : side // 2, :3], torch.tensor([1.0, 0, 0]).expand(side, side // 2, 3)
            )
            assert not grid[:, :, side // 2 :, :3].any()
            assert grid[1, 0, 0, 1] == 1 and not grid[..., 3:].any()
        else:
            (features,) = seen
            assert (features[:, 0] > 0).any() and (features[:, 1] > 0).any()
            assert not ((features[:, 0] > 0) & (features[:, 1] > 0)).any()


def test_a_colour_that_tells_the_class_silences_its_examples():
    # Only the bias head learns; the main term shrinks with what it explains.
    torch.manual_seed(0)
    model = tiny_model("faster", config("DebiasedFocalLoss", "faster", sees="geometry"))
    attach_bias_heads(model)
    loss = model.roi_head.bbox_head.loss_cls
    optimizer = torch.optim.Adam(loss.bias.parameters(), lr=0.2)
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        _, losses = train_once(model)
        optimizer.step()
        values.append(losses["loss_cls"].item())
    assert values[-1] < 0.8 * values[0]


def test_frozen_head_gets_no_loss_and_no_gradient():
    model = tiny_model("faster", config("ProductOfExpertsLoss", "faster", frozen=True))
    attach_bias_heads(model)
    train_once(model)
    head = next(module for module in model.modules() if isinstance(module, BiasHead))
    assert all(p.grad is None for p in head.parameters())


def test_the_hook_connects_and_disconnects():
    model = tiny_model("retina", config("DebiasedFocalLoss", "retina"))

    class Runner:
        pass

    runner = Runner()
    runner.model = model
    hook = BiasHeadHook()
    hook.before_train(runner)
    train_once(model)
    hook.after_train(runner)
    with pytest.raises(ValueError, match=r"BiasHead has logits for 0 of .* custom_hooks"):
        train_once(model)


@pytest.mark.parametrize(
    ("detector", "change", "message"),
    [
        ("retina", dict(num_anchors=3), "has 27 scores at each place and its BiasHead 9"),
        ("retina", dict(sees="features", in_channels=8), "have 256 channels and its BiasHead in_"),
        ("faster", dict(background=False), "BiasHead has 3 columns for logits of 4"),
    ],
)
def test_a_head_that_does_not_fit_is_one_sentence(detector, change, message):
    loss = config("ProductOfExpertsLoss", detector)
    loss["bias"].update(change)
    model = tiny_model(detector, loss)
    attach_bias_heads(model)
    with pytest.raises(ValueError, match=message):
        train_once(model)


def test_a_model_without_a_bias_head_is_refused():
    with pytest.raises(ValueError, match="no loss of the model has a BiasHead"):
        attach_bias_heads(tiny_model("retina"))


@pytest.mark.parametrize(
    ("head", "config_name"),
    [
        ("YOLOXHead", "yolox/yolox_s_8xb8-300e_coco.py"),
        ("PISARetinaHead", "pisa/retinanet-r50_fpn_pisa_1x_coco.py"),
        ("PAAHead", "paa/paa_r50_fpn_1x_coco.py"),
        ("LADHead", "lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py"),
        ("YOLACTHead", "yolact/yolact_r50_1xb8-55e_coco.py"),
        ("DeformableDETRHead", "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"),
    ],
)
def test_heads_with_other_rows_or_another_order_are_refused(head, config_name):
    settings = get_config(f"mmdet::{config_name}").model.bbox_head
    settings.loss_cls = config("ProductOfExpertsLoss", "retina")
    settings.loss_cls.use_sigmoid = head != "YOLACTHead"
    if head == "DeformableDETRHead":
        settings.update(num_pred_layer=2)
    model = nn.Module()
    model.bbox_head = MODELS.build(settings)
    message = f"bbox_head is a {head} with a BiasHead: expected a head that gives one map of scores"
    with pytest.raises(ValueError, match=message):
        attach_bias_heads(model)
