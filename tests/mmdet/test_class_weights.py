"""Weights by class from the training data: in configs, in the dump of a training, at a test."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from cells import cells, change, spoil
from mmengine.config import Config
from prepared import prepare_experiment

from polyfocal.errors import UserError
from polyfocal.mmengine import use_class_weights

ROOT = Path(__file__).parents[2]
RETINANET = ROOT / "configs" / "retinanet_poly1.py"
MASK_RCNN = ROOT / "configs" / "mask_rcnn_poly1.py"
LOSS = "model.bbox_head.loss_cls"
BOX_LOSS = "model.roi_head.bbox_head.loss_cls"
# Of 12 boxes 2 RBC, 2 WBC and 3 Platelets are left: see test_training_objects.py.
LEFT = {"RBC": 2, "WBC": 2, "Platelets": 3}
BALANCED = [1.16667, 1.16667, 0.777778]  # 7 / (3 x 2) and 7 / (3 x 3)


def uneven(tmp_path, **settings):
    root = cells(tmp_path / "cells", objects=6, pictures=2, **settings)
    change(root, "train", spoil)
    return root


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_what_is_left_out_of_a_training_does_not_weigh(tmp_path):
    experiment = prepare_experiment(
        RETINANET,
        data=uneven(tmp_path),
        options={f"{LOSS}.class_weight": "balanced", f"{LOSS}.alpha": "sqrt"},
    )
    loss = experiment.config.model.bbox_head.loss_cls
    assert loss.class_weight == BALANCED
    roots = [one**0.5 for one in BALANCED]
    assert loss.alpha == pytest.approx([one / (one + 3) for one in roots], abs=1e-5)
    sentence = f"{LOSS}.class_weight is balanced of the training data: RBC 1.17, WBC 1.17, Pla"
    assert any(note.startswith(sentence) for note in experiment.notes)


def test_a_softmax_loss_has_a_background_column(tmp_path):
    root = uneven(tmp_path, masks=True)
    options = {f"{BOX_LOSS}.class_weight": "balanced"}
    cfg = prepare_experiment(MASK_RCNN, data=root, options=options).config
    assert cfg.model.roi_head.bbox_head.loss_cls.class_weight == [*BALANCED, 1.0]


def test_inside_an_adapter_of_a_cascade(tmp_path):
    path = tmp_path / "cascade.py"
    loss = (
        "dict(type='polyfocal.RoILoss', loss=dict(type='polyfocal.FocalLoss',"
        " use_sigmoid=True, class_weight=dict(method='effective', beta=0.5)))"
    )
    head = f"dict(type='Shared2FCBBoxHead', num_classes=3, loss_cls={loss})"
    path.write_text(
        "_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'\n"
        f"model = dict(roi_head=dict(bbox_head=[{head}, {head}, {head}]))\n"
    )
    cfg = prepare_experiment(path, data=uneven(tmp_path)).config
    # One over the effective numbers 1.5, 1.5 and 1.75.
    inverse = [1 / 1.5, 1 / 1.5, 1 / 1.75]
    expected = pytest.approx([3 * one / sum(inverse) for one in inverse], abs=1e-5)
    for one in cfg.model.roi_head.bbox_head:
        assert one.loss_cls.loss.class_weight == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"model.rpn_head.loss_cls": dict(type="polyfocal.FocalLoss", class_weight="sqrt")},
            "model.rpn_head.loss_cls.class_weight asks for .* and a proposal head does not",
        ),
        (
            {
                "model.roi_head.bbox_head.loss_cls": dict(
                    type="CrossEntropyLoss", class_weight="sqrt"
                )
            },
            "class_weight='sqrt' is for the losses of polyfocal .* is a CrossEntropyLoss",
        ),
        (
            {f"{BOX_LOSS}.class_weight": "even"},
            "class_weight='even': expected numbers, one per class",
        ),
    ],
)
def test_refuses(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare_experiment(MASK_RCNN, data=uneven(tmp_path, masks=True), options=options)


def test_a_config_without_such_a_loss_is_left_alone():
    cfg = Config(dict(model=dict(type="X", neck=dict(alpha="auto"))))
    assert use_class_weights(cfg) == []
    assert cfg.model.neck.alpha == "auto"


def test_from_the_command_line_to_the_dump_and_a_test_without_annotations(tmp_path, capsys):
    root, work_dir = uneven(tmp_path), tmp_path / "run"
    fast = ["train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]
    common = ["--data", root, "--profile", "tiny", "--work-dir", work_dir, "--cfg-options"]
    common += [*fast, "test_dataloader.num_workers=0", f"{LOSS}.class_weight=balanced"]
    assert tool("train")(RETINANET, *common, "train_cfg.max_epochs=1") == 0
    assert f"note: {LOSS}.class_weight is balanced of the" in capsys.readouterr().out
    (dump,) = work_dir.glob("*/vis_data/config.py")
    assert Config.fromfile(dump).model.bbox_head.loss_cls.class_weight == BALANCED
    (root / "annotations" / "train.json").unlink()
    checkpoint = work_dir / "epoch_1.pth"
    assert tool("test")(RETINANET, checkpoint, *common) == 0
    assert "class_weight is" not in capsys.readouterr().out


def test_counts_of_a_file_are_numbers_in_the_dump_and_a_test_needs_no_file(tmp_path):
    root, work_dir = uneven(tmp_path), tmp_path / "run"
    path = tmp_path / "mine.py"
    file = str(root / "annotations" / "train.json")
    path.write_text(
        f"_base_ = {str(RETINANET)!r}\n"
        "model = dict(bbox_head=dict(loss_cls=dict(_delete_=True,"
        " type='polyfocal.DebiasedFocalLoss', use_sigmoid=True,"
        f" bias=dict(type='polyfocal.ClassPriors', class_counts={file!r}))))\n"
    )
    fast = ["train_dataloader.num_workers=0", "val_dataloader.num_workers=0"]
    common = ["--data", root, "--profile", "tiny", "--work-dir", work_dir, "--cfg-options"]
    common += [*fast, "test_dataloader.num_workers=0"]
    assert tool("train")(path, *common, "train_cfg.max_epochs=1") == 0
    (dump,) = work_dir.glob("*/vis_data/config.py")
    assert Config.fromfile(dump).model.bbox_head.loss_cls.bias.class_counts == [
        4,
        3,
        4,
    ]  # the crowd is a WBC
    (root / "annotations" / "train.json").unlink()
    assert tool("test")(path, work_dir / "epoch_1.pth", *common) == 0
    with pytest.raises(UserError, match="train.json"):
        use_class_weights(Config.fromfile(path))
