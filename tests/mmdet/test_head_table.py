"""The table of heads against the classes of the installed MMDetection and MMDetection3D."""

import importlib
import inspect
import warnings
from pathlib import Path

import pytest

pytest.importorskip("mmdet.models", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from mmdet.models.dense_heads import GFLHead, RetinaHead
from mmengine.model import BaseModule
from mmengine.registry import MODELS

import polyfocal.mmdet
from polyfocal import heads, losses
from polyfocal.errors import UserError
from polyfocal.mmdet import placement

ROOT = Path(__file__).resolve().parents[2]
CLASSIFICATION = {
    "CrossEntropyLoss", "FocalLoss", "GHMC", "GaussianFocalLoss", "MultiPosCrossEntropyLoss",
    "QualityFocalLoss", "SeesawLoss", "VarifocalLoss",
}  # fmt: skip
POLY1 = dict(epsilon=0.5, use_sigmoid=True)


def classes(framework):
    registry = importlib.import_module(f"{framework}.registry").MODELS
    importlib.import_module(f"{framework}.models")
    return [cls for cls in registry.module_dict.values() if inspect.isclass(cls)]


def default_losses(cls):
    """The keywords of a class whose default is the config of a classification loss."""
    init = next(vars(k)["__init__"] for k in cls.__mro__ if "__init__" in vars(k))
    for parameter in inspect.signature(init).parameters.values():
        if isinstance(parameter.default, dict):
            name = str(parameter.default.get("type")).rpartition(".")[2]
            if name in CLASSIFICATION:
                yield parameter.name, name


@pytest.mark.parametrize("framework", ["mmdet", "mmdet3d"])
def test_every_head_of_the_framework_is_in_the_table(framework):
    pytest.importorskip(f"{framework}.registry", reason=f"needs {framework}")
    slots = 0
    for cls in classes(framework):
        for name, stock in default_losses(cls):
            slots += 1
            slot = heads.slot_of(cls, name)
            assert slot is not None, f"{cls.__name__}.{name}: {stock}"
            assert heads.is_known(cls), cls.__name__
    assert slots > 20


@pytest.mark.parametrize("slot", heads.SLOTS, ids=lambda s: f"{s.framework}-{s.head}-{s.name}")
def test_every_row_names_a_class_that_exists(slot):
    if slot.framework in ("mmdet", "mmdet3d"):
        pytest.importorskip(f"{slot.framework}.registry", reason=f"needs {slot.framework}")
        unregistered = {"Base3DDecodeHead", "DDQAuxLoss"}
        assert slot.head in {cls.__name__ for cls in classes(slot.framework)} | unregistered
    assert slot.kind in heads.KINDS
    assert set(heads.KINDS[slot.kind].fits) <= heads.FAMILIES.keys()


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    assert heads.as_markdown() in page, "run python tools/write_heads_page.py"


def built(name, **settings):
    return MODELS.build(dict(type=f"polyfocal.{name}", **settings))


LOSSES = {
    heads.SIGMOID: lambda: built("Poly1FocalLoss", **POLY1),
    heads.SOFTMAX: lambda: built("Poly1CrossEntropyLoss", use_sigmoid=False),
    heads.OWN_SOFTMAX: lambda: built("NoisedTopKLoss", k=1, epsilon=0.1),
    heads.QUALITY: lambda: built("Poly1VarifocalLoss", **POLY1),
    heads.PROBABILITY_QUALITY: lambda: built("Poly1QualityFocalLoss", activated=True, **POLY1),
    heads.PROBABILITY: lambda: built("Poly1FocalLoss", activated=True, **POLY1),
    heads.HEATMAP: lambda: built("GaussianPoly1FocalLoss", epsilon=0.5),
    "RoILoss": lambda: built("RoILoss", loss=dict(type="polyfocal.Poly1FocalLoss", **POLY1)),
    heads.ROI_SOFTMAX: lambda: built(
        "RoILoss", loss=dict(type="polyfocal.LDAMLoss", class_counts=[5, 1])
    ),
    "MaskLoss": lambda: built("MaskLoss", loss=dict(type="polyfocal.Poly1FocalLoss", **POLY1)),
}


@pytest.mark.parametrize("kind", heads.KINDS.values(), ids=list(heads.KINDS))
def test_a_loss_that_does_not_fit_is_answered_with_what_does(kind):
    for of, loss in LOSSES.items():
        loss = loss()
        assert heads.family(loss) == of
        reason = heads.misplaced(RetinaHead, "loss_cls", loss, kind)
        assert (reason is None) == (of in kind.fits)
        if reason is not None:
            assert reason.startswith("RetinaHead.loss_cls is a ") and "RetinaHead" in reason


def test_ldam_serves_the_plain_softmax_only_at_scale_1():
    assert heads.family(built("LDAMLoss", class_counts=[5, 1])) == heads.OWN_SOFTMAX
    assert heads.family(built("LDAMLoss", class_counts=[5, 1], scale=1.0)) == heads.SOFTMAX


def test_a_head_that_compares_features_takes_any_scale_of_ldam():
    from mmdet.models.reid import LinearReIDHead

    kind = heads.KINDS[heads.slot_of(LinearReIDHead, "loss_cls").kind]
    loss = built("LDAMLoss", class_counts=[5, 1], scale=30.0)
    assert heads.misplaced(LinearReIDHead, "loss_cls", loss, kind) is None
    loss = LOSSES[heads.SIGMOID]()
    assert "takes no scores" in heads.misplaced(LinearReIDHead, "loss_cls", loss, kind)


def test_other_losses_are_let_through():
    assert heads.family(MODELS.build(dict(type="mmdet.FocalLoss"))) is None
    assert heads.family(losses.ClassPriors([1, 2])) is None


def test_an_unknown_head_is_named_with_what_is_assumed():
    class StrangeHead(BaseModule):
        def __init__(self, loss):
            super().__init__()
            self.loss_cls = loss

    class MyGFLHead(GFLHead):
        def __init__(self, loss_cls):
            anchors = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=8,
                           scales_per_octave=1, strides=[8])  # fmt: skip
            super().__init__(3, 8, loss_cls=loss_cls, anchor_generator=anchors)

    with pytest.warns(UserWarning, match=r"does not know .*StrangeHead.loss_cls: it is assumed"):
        StrangeHead(LOSSES[heads.SIGMOID]())
    with pytest.warns(UserWarning, match=r"MyGFLHead.loss_cls: .* what GFLHead.loss_cls gets, pai"):
        MyGFLHead(dict(type="polyfocal.Poly1QualityFocalLoss", **POLY1))
    with pytest.raises(UserError, match=r"MyGFLHead.loss_cls is a Poly1FocalLoss"):
        MyGFLHead(dict(type="polyfocal.Poly1FocalLoss", **POLY1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StrangeHead(LOSSES[heads.SIGMOID]())  # said once
        StrangeHead(MODELS.build(dict(type="mmdet.FocalLoss")))
        placement.check(RetinaHead(3, 8), "loss_cls", LOSSES[heads.SIGMOID]())


def test_somebodys_own_model_is_left_alone():
    from torch import nn

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = nn.Module()
        module.loss = LOSSES[heads.SOFTMAX]()
    assert polyfocal.mmdet.placement is placement
