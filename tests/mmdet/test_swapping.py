"""Configs with their losses swapped."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet.models", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope

import polyfocal
from polyfocal.commands import swap_loss
from polyfocal.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RTMDET = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
TOOD = "mmdet::tood/tood_r50_fpn_1x_coco.py"
CASCADE = "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"
MASK = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
SEESAW = "mmdet::seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py"
POINTPILLARS = "mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"
DOUBLE = "mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py"
DETR = "mmdet::detr/detr_r50_8xb2-150e_coco.py"


def test_a_loss_becomes_its_poly1_form_and_the_config_given_stays():
    cfg = get_config(RTMDET)
    swapped = polyfocal.swap(cfg, "poly1", epsilon=0.5)
    assert swapped.model.bbox_head.loss_cls == dict(
        type="polyfocal.Poly1QualityFocalLoss", epsilon=0.5, use_sigmoid=True, beta=2.0,
        loss_weight=1.0,
    )  # fmt: skip
    assert cfg.model.bbox_head.loss_cls.type == "QualityFocalLoss"
    head = polyfocal.swap(TOOD).model.bbox_head
    assert head.initial_loss_cls.type == "polyfocal.Poly1FocalLoss"
    assert head.initial_loss_cls.activated and head.loss_cls.activated
    assert head.loss_cls.epsilon == head.initial_loss_cls.epsilon == 1.0
    detr = polyfocal.swap(DETR, epsilon=0.0).model.bbox_head.loss_cls
    assert (detr.bg_cls_weight, detr.class_weight) == (0.1, 1.0)


def test_proposals_and_masks_are_swapped_when_they_are_named():
    plain = polyfocal.swap(MASK, epsilon=1.0).model
    assert plain.rpn_head.loss_cls.type == "CrossEntropyLoss"
    assert plain.roi_head.mask_head.loss_mask.type == "CrossEntropyLoss"
    assert plain.roi_head.bbox_head.loss_cls.type == "polyfocal.Poly1CrossEntropyLoss"
    named = polyfocal.swap(MASK, slots=["mask_head", "rpn_head.loss_cls"], epsilon=1.0).model
    assert named.rpn_head.loss_cls.use_sigmoid is True
    assert named.roi_head.bbox_head.loss_cls.type == "CrossEntropyLoss"
    assert named.roi_head.mask_head.loss_mask == dict(
        type="polyfocal.MaskLoss",
        loss=dict(
            type="polyfocal.Poly1CrossEntropyLoss", epsilon=1.0, use_sigmoid=True, loss_weight=1.0
        ),
    )


def test_the_proposals_of_a_student_and_its_teacher_stay():
    """They are two stages inside of another model, so that the RPN stands deeper."""
    name = "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"
    detector = polyfocal.swap(name).model.detector
    assert detector.roi_head.bbox_head.loss_cls.type == "polyfocal.Poly1CrossEntropyLoss"
    assert detector.rpn_head.loss_cls.type == "CrossEntropyLoss"


def test_another_loss_is_put_into_the_form_of_the_head():
    retina = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
    loss = polyfocal.swap(retina, "CyclicalFocalLoss", gamma_hc=2.0).model.bbox_head.loss_cls
    assert loss == dict(
        type="polyfocal.CyclicalFocalLoss", gamma_hc=2.0, use_sigmoid=True, alpha=0.25,
        loss_weight=1.0,
    )  # fmt: skip
    topk = polyfocal.swap(MASK, "NoisedTopKLoss", k=3, epsilon=0.1).model.roi_head.bbox_head
    assert topk.loss_cls.type == "polyfocal.RoILoss"
    assert topk.loss_cls.loss.type == "polyfocal.NoisedTopKLoss"
    for config in (MASK, DOUBLE):
        ldam = polyfocal.swap(config, "LDAMLoss", class_counts=[1] * 80).model.roi_head.bbox_head
        assert ldam.loss_cls.type == "polyfocal.RoILoss"
        assert ldam.loss_cls.loss.type == "polyfocal.LDAMLoss"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FocalLoss", dict(gamma=0.0)),
        ("Poly1FocalLoss", dict(gamma=0.0, epsilon=0.0)),
        ("PolyNLoss", dict(gamma=0.0, epsilons=[0.0])),
        ("CyclicalFocalLoss", dict(gamma_hc=0.0, gamma_lc=0.0)),
    ],
)
def test_without_gamma_a_focal_loss_in_the_place_of_a_cross_entropy_is_one(name, settings):
    """In the softmax form alpha, 0.25 by default for the sigmoid form, would quarter the loss."""
    found = {}
    for cfg in (get_config(MASK), polyfocal.swap(MASK, name, **settings)):
        with DefaultScope.overwrite_default_scope("mmdet"):
            config = dict(cfg.model.roi_head.bbox_head, in_channels=4, fc_out_channels=8)
            head = MODELS.build(config)
        if hasattr(head.loss_cls, "set_progress"):
            head.loss_cls.set_progress(1.0)
        torch.manual_seed(0)
        scores, labels = torch.randn(40, 81), torch.randint(81, (40,))
        boxes = torch.zeros(40, 4)
        losses = head.loss(
            scores, torch.zeros(40, 320), torch.zeros(40, 5), labels, torch.ones(40), boxes, boxes
        )
        found[cfg.model.roi_head.bbox_head.loss_cls.type] = losses["loss_cls"]
    torch.testing.assert_close(found[f"polyfocal.{name}"], found["CrossEntropyLoss"])


def test_alpha_is_left_out_where_a_loss_becomes_a_softmax():
    retina = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"  # sigmoid, alpha 0.25
    for name in ("poly1", "FocalLoss", "PolyNLoss"):
        more = dict(epsilons=[1.0]) if name == "PolyNLoss" else {}
        loss = polyfocal.swap(retina, name, use_sigmoid=False, **more).model.bbox_head.loss_cls
        assert loss.use_sigmoid is False and loss.alpha is None, name
    box = "roi_head.bbox_head.loss_cls"
    swapped = polyfocal.swap(MASK, "FocalLoss", alpha=0.5)
    assert swapped.model.roi_head.bbox_head.loss_cls.alpha == 0.5
    # A softmax focal loss keeps its form and its alpha.
    loss = polyfocal.swap(swapped, slots=[box]).model.roi_head.bbox_head.loss_cls
    assert (loss.type, loss.use_sigmoid, loss.alpha) == ("polyfocal.Poly1FocalLoss", False, 0.5)


def test_another_loss_keeps_the_settings_that_mean_the_same():
    cfg = get_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py")
    stock = cfg.model.bbox_head.loss_cls
    stock.update(gamma=1.0, alpha=0.5)
    of_labels = ("FocalLoss", "Poly1FocalLoss", "PolyNLoss", "DebiasedFocalLoss")
    for name in of_labels:
        more = dict(Poly1FocalLoss=dict(epsilon=1.0), PolyNLoss=dict(epsilons=[1.0]))
        swapped = polyfocal.swap(cfg, name, **more.get(name, {}))
        loss = swapped.model.bbox_head.loss_cls
        assert (loss.gamma, loss.alpha) == (1.0, 0.5), name
        back = polyfocal.swap(swapped, "FocalLoss", slots=["loss_cls"]).model.bbox_head.loss_cls
        if name in ("FocalLoss", "Poly1FocalLoss"):
            assert (back.gamma, back.alpha) == (1.0, 0.5), name
    assert polyfocal.swap(cfg, "FocalLoss", gamma=3.0).model.bbox_head.loss_cls.gamma == 3.0
    # Another form, or a loss in which the words mean something else.
    assert "gamma" not in polyfocal.swap(cfg, "AdaFocalLoss").model.bbox_head.loss_cls
    vfnet = get_config("mmdet::vfnet/vfnet_r50_fpn_1x_coco.py")
    vfnet.model.bbox_head.loss_cls.gamma = 1.5
    aware = polyfocal.swap(vfnet, "Poly1IoUAwareBCELoss", epsilon=1.0).model.bbox_head.loss_cls
    assert "alpha" not in aware and "gamma" not in aware
    same = polyfocal.swap(vfnet, "Poly1VarifocalLoss", epsilon=1.0).model.bbox_head.loss_cls
    assert (same.alpha, same.gamma) == (0.75, 1.5)
    for name in ("Poly1CrossEntropyLoss", "FocalLoss"):
        detr = polyfocal.swap(DETR, name, **dict(epsilon=0.0) if "Poly" in name else {})
        loss = detr.model.bbox_head.loss_cls
        assert (loss.use_sigmoid, loss.bg_cls_weight, loss.class_weight) == (False, 0.1, 1.0)
    name = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
    loss = polyfocal.swap(name, "FocalLoss", slots=["loss_cls"]).model.panoptic_head.loss_cls
    assert list(loss.class_weight) == [1.0] * 80 + [0.1]


def test_values_that_only_a_config_may_have_are_taken(tmp_path):
    retina = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
    loss = polyfocal.swap(retina, class_weight="balanced").model.bbox_head.loss_cls
    assert loss.class_weight == "balanced"
    effective = dict(method="effective", beta=0.9)
    loss = polyfocal.swap(retina, "FocalLoss", alpha=effective).model.bbox_head.loss_cls
    assert loss.alpha == effective
    with pytest.raises(UserError, match="class_weight='balance': expected numbers, one per class"):
        polyfocal.swap(retina, class_weight="balance")
    priors = dict(type="polyfocal.ClassPriors", class_counts=[1] * 80)
    loss = polyfocal.swap(retina, "DebiasedFocalLoss", bias=priors).model.bbox_head.loss_cls
    assert loss.bias == priors
    file = tmp_path / "counts.json"
    images = [dict(id=1, width=9, height=9, file_name="a.png")]
    boxes = [dict(id=k, image_id=1, category_id=k, bbox=[0, 0, 5, 5], area=25, iscrowd=0)
             for k in (1, 2)]  # fmt: skip
    classes = [dict(id=k, name=str(k)) for k in (1, 2)]
    file.write_text(json.dumps(dict(images=images, annotations=boxes, categories=classes)))
    ldam = dict(class_counts=str(file), scale=1.0)
    head = polyfocal.swap(MASK, "LDAMLoss", **ldam).model.roi_head.bbox_head
    assert head.loss_cls.class_counts == str(file)


@pytest.mark.parametrize("config", [RTMDET, TOOD, CASCADE, MASK, POINTPILLARS])
def test_the_written_config_is_the_swapped_one(config, tmp_path):
    if config.startswith("mmdet3d"):
        pytest.importorskip("mmdet3d.registry", reason="needs MMDetection3D")
    out = tmp_path / "my.py"
    assert swap_loss.main([config, "--loss", "poly1", "--epsilon", "0.5", "--out", str(out)]) == 0
    expected = polyfocal.swap(config, epsilon=0.5)
    read = Config.fromfile(out)
    found = read.model.to_dict()
    assert found.pop("_scope_") == config.split(":")[0]  # of what comes from the framework
    assert found == expected.model.to_dict()
    assert len(out.read_text().splitlines()) <= 7
    before = out.read_text()
    assert swap_loss.main([config, "--loss", "poly1", "--out", str(out)]) == 2
    assert out.read_text() == before
    if config == POINTPILLARS:
        assert read.model.bbox_head.type == "polyfocal.Anchor3DHead"
    with pytest.raises(UserError, match="a loss of this package already: set its epsilon"):
        polyfocal.swap(out)


def test_a_loss_that_the_base_leaves_to_its_head(tmp_path):
    """The head's default is FCOS's focal loss, gamma 2 and alpha 0.25, which the new file names."""
    own, out = tmp_path / "own.py", tmp_path / "my.py"
    own.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(type='FCOS', backbone=dict(type='ResNet', depth=50),\n"
        "    bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=8))\n"
    )
    assert swap_loss.main([str(own), "--loss", "poly1", "--out", str(out)]) == 0
    with DefaultScope.overwrite_default_scope("mmdet"):
        loss = MODELS.build(Config.fromfile(out).model.bbox_head).loss_cls
    assert type(loss).__name__ == "Poly1FocalLoss"
    assert (loss.epsilon, loss.gamma, loss.alpha) == (1.0, 2.0, 0.25)


def test_a_whole_name_selects_one_loss():
    """``bbox_head.loss_cls`` begins the name of ``bbox_head.loss_cls_fl``, too."""
    vfnet = "mmdet::vfnet/vfnet_r50_fpn_1x_coco.py"
    stock = get_config(vfnet).model.bbox_head
    head = polyfocal.swap(vfnet, slots=["bbox_head.loss_cls"]).model.bbox_head
    assert head.loss_cls.type == "polyfocal.Poly1VarifocalLoss"
    assert "loss_cls_fl" not in stock and "loss_cls_fl" not in head
    part = polyfocal.swap(vfnet, slots=["bbox_head.loss"]).model.bbox_head
    assert part.loss_cls.type == "polyfocal.Poly1VarifocalLoss"
    assert part.loss_cls_fl.type == "polyfocal.Poly1FocalLoss"


def test_a_file_of_ones_own(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(f"_base_ = {RTMDET!r}\nmodel = dict(bbox_head=dict(num_classes=3))\n")
    out = tmp_path / "my.py"
    assert swap_loss.main([str(own), "--loss", "poly1", "--out", str(out)]) == 0
    head = Config.fromfile(out).model.bbox_head
    assert head.num_classes == 3 and head.loss_cls.type == "polyfocal.Poly1QualityFocalLoss"


@pytest.mark.parametrize(
    ("stock", "head"), [("rtmdet/rtmdet_s_8xb32-300e_coco.py", "bbox_head"),
                        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", "roi_head")],
)  # fmt: skip
def test_a_config_of_the_new_style_stays_one(stock, head, tmp_path, monkeypatch):
    from new_style import new_style

    (tmp_path / "configs").mkdir()
    base = tmp_path / "configs" / "my_base.py"
    base.write_text(new_style(stock, "mmdet"))
    cfg = Config.fromfile(base)
    expected = polyfocal.swap(cfg, epsilon=0.5).model[head]
    assert "polyfocal.Poly1" in str(expected) and "polyfocal.Poly1" not in str(cfg.model)
    out = tmp_path / "my.py"
    assert (
        swap_loss.main([str(base), "--loss", "poly1", "--epsilon", "0.5", "--out", str(out)]) == 0
    )
    assert "    from .configs.my_base import *\n" in out.read_text()
    read = Config.fromfile(out)
    assert read.model[head].to_dict() == expected.to_dict()
    # What a file cannot import is said before anything is written.
    odd = tmp_path / "my-base.py"
    odd.write_text(base.read_text())
    assert swap_loss.main([str(odd), "--loss", "poly1", "--out", str(tmp_path / "b.py")]) == 2
    assert not (tmp_path / "b.py").exists()


def test_the_table_shows_every_loss(capsys):
    assert swap_loss.main([MASK]) == 0
    shown = capsys.readouterr().out
    for where in ("rpn_head.loss_cls", "roi_head.bbox_head.loss_cls", "mask_head.loss_mask"):
        assert where in shown
    assert "fits: `MaskLoss` around a sigmoid loss" in shown


@pytest.mark.parametrize(
    ("config", "loss", "settings", "message"),
    [
        (SEESAW, "poly1", {}, "Shared2FCBBoxHead.loss_cls is a SeesawLoss, which has no Poly-1"),
        (RTMDET, "FocalLoss", {}, "RTMDetSepBNHead.loss_cls is a FocalLoss, which takes logits"),
        (
            DOUBLE,
            "FocalLoss",
            dict(use_sigmoid=True),
            r"logits \(N, C \+ 1\), whatever the loss is",
        ),
        (RTMDET, "poly1", dict(gamma=2), "Poly1QualityFocalLoss has no setting 'gamma': it has ep"),
        (RTMDET, "poly1", dict(epsilon=-3), "epsilon=-3: expected"),
        (RTMDET, "poly", {}, "loss='poly': expected poly1 or one of AdaFocalLoss"),
        (RTMDET, "poly1", dict(slots=["mask"]), r"named mask: .* are bbox_head.loss_cls"),
        ("no.py", "poly1", {}, "there is no config no.py"),
        ("mmdet::no.py", "poly1", {}, "mmdet::no.py cannot be read as a config"),
        (dict(a=1), "poly1", {}, "the config has no model"),
        (
            3,
            "poly1",
            {},
            "swap takes a config of MMDetection, MMDetection3D or Detectron2, not a int",
        ),
        ("detectron2::a.yaml", "poly1", {}, "a.yaml: docs/detectron2.md says where a yaml"),
    ],
)
def test_what_cannot_be_swapped_is_said(config, loss, settings, message):
    with pytest.raises(UserError, match=message):
        polyfocal.swap(config, loss, **settings)


def test_the_tool_says_it_too(capsys):
    assert swap_loss.main([SEESAW, "--loss", "poly1"]) == 2
    assert "error: Shared2FCBBoxHead.loss_cls is a SeesawLoss" in capsys.readouterr().err
    assert swap_loss.main([MASK, "--epsilon", "1"]) == 2
    assert swap_loss.main([MASK, "--loss", "poly1", "gamma"]) == 2
