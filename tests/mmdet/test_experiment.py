"""A config meets a data set: classes, paths, evaluation and limits, and what is refused."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

import torch
from cells import CLASSES as CELLS
from cells import cells as drawn_cells
from lite0 import use_random_weights
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image
from prepared import prepare_experiment

from polyfocal.errors import UserError
from polyfocal.mmengine.configs import type_name, walk

STOCK = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "voc": "pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py",
    "mosaic": "yolox/yolox_s_8xb8-300e_coco.py",
    "proposals": "rpn/rpn_r50_fpn_1x_coco.py",
    "two_necks": "dyhead/atss_r50_fpn_dyhead_1x_coco.py",
    "balanced": "libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py",
    "one_level": "yolof/yolof_r50-c5_8xb8-1x_coco.py",
    "coarse_first": "yolo/yolov3_d53_8xb8-320-273e_coco.py",
    "no_neck": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
}


def config(tmp_path, name, more=""):
    path = tmp_path / f"{name}.py"
    path.write_text(f'_base_ = "mmdet::{STOCK[name]}"\n{more}')
    return path


def cells(tmp_path, **settings):
    return drawn_cells(tmp_path / "cells", **settings)


def num_classes(model):
    return [node.num_classes for node in walk(model) if "num_classes" in node]


def test_data_sets_classes_paths_and_evaluation(tmp_path):
    root = cells(tmp_path)
    cfg = prepare_experiment(config(tmp_path, "retinanet"), data=root).config
    assert num_classes(cfg.model) == [3]
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        with DefaultScope.overwrite_default_scope("mmdet"):
            dataset = DATASETS.build(cfg[f"{loader}_dataloader"].dataset | {"pipeline": []})
        assert dataset.metainfo["classes"] == CELLS
        assert len(dataset.metainfo["palette"]) == 3
        (picture,) = (dataset.get_data_info(index) for index in range(len(dataset)))
        assert picture["img_path"] == str(root / "images" / split / "cell_0.png")
        assert [box["bbox_label"] for box in picture["instances"]] == [0, 1, 2]
        assert picture["instances"][1]["bbox"] == [1, 5, 13, 15]
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.type == "polyfocal.CocoMetric"
        assert evaluator.ann_file == str(root / "annotations" / "val.json")
        assert evaluator.metric == "bbox"
    assert cfg.model.backbone.depth == 50, "the full model"


def test_a_note_says_that_val_has_pictures_of_train(tmp_path):
    root = cells(tmp_path)
    val = root / "images" / "val" / "cell_0.png"
    val.unlink()
    val.hardlink_to(root / "images" / "train" / "cell_0.png")
    note = "1 pictures are in train and in val: scores on val mean little."
    assert prepare_experiment(config(tmp_path, "retinanet"), data=root).notes == [note]
    assert not prepare_experiment(config(tmp_path, "retinanet"), data=root, train=False).notes


def test_every_num_classes_but_the_proposals(tmp_path):
    more = "model = dict(rpn_head=dict(num_classes=1))"
    path = config(tmp_path, "cascade", more)
    cfg = prepare_experiment(path, data=cells(tmp_path, masks=True)).config
    assert cfg.model.rpn_head.num_classes == 1
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [3, 3, 3]
    assert cfg.model.roi_head.mask_head.num_classes == 3
    assert cfg.val_evaluator.metric == ["bbox", "segm"]


def test_data_inside_wrappers(tmp_path):
    """VOC's config repeats a concatenation of two sets; YOLOX's mixes several pictures."""
    root = cells(tmp_path)
    cfg = prepare_experiment(config(tmp_path, "voc"), data=root).config
    assert cfg.val_evaluator.type == "polyfocal.CocoMetric"
    with DefaultScope.overwrite_default_scope("mmdet"):
        train = DATASETS.build(cfg.train_dataloader.dataset)
    assert train.metainfo["classes"] == CELLS and len(train) == 3, "one picture, repeated"

    cfg = prepare_experiment(config(tmp_path, "mosaic"), data=root).config
    assert cfg.train_dataloader.dataset.type == "MultiImageMixDataset"
    assert cfg.train_dataloader.dataset.dataset.ann_file == str(root / "annotations/train.json")
    assert num_classes(cfg.model) == [3]


def test_masks_need_masks(tmp_path):
    with pytest.raises(UserError, match=r"mask_rcnn.py needs masks: .*train.json"):
        prepare_experiment(config(tmp_path, "mask_rcnn"), data=cells(tmp_path))


def test_crowded_pictures_raise_the_limits(tmp_path):
    root = cells(tmp_path, objects=101, masks=True)
    experiment = prepare_experiment(config(tmp_path, "mask_rcnn"), data=root, profile="tiny")
    cfg = experiment.config
    assert cfg.model.test_cfg.rcnn.max_per_img == cfg.val_evaluator.max_dets == 200
    assert cfg.model.test_cfg.rpn.max_per_img >= 200
    (note,) = experiment.notes
    assert "holds up to 101 objects: up to 200 detections" in note


def test_usual_pictures_keep_cocos_limits(tmp_path):
    root = cells(tmp_path, objects=100)
    experiment = prepare_experiment(config(tmp_path, "retinanet"), data=root)
    assert experiment.config.model.test_cfg.max_per_img == 100
    assert "max_dets" not in experiment.config.val_evaluator and not experiment.notes


def test_calibration_stays_asked_for(tmp_path):
    more = 'val_evaluator = dict(type="polyfocal.CalibrationMetric", iou=0.75)\n'
    path = config(tmp_path, "retinanet", more + "test_evaluator = val_evaluator\n")
    data = cells(tmp_path)
    cfg = prepare_experiment(path, data=data).config
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert (evaluator.type, evaluator.iou) == ("polyfocal.CalibrationMetric", 0.75)
        assert evaluator.ann_file == str(data / "annotations" / "val.json")


def test_splits_must_agree_on_the_categories(tmp_path):
    root = cells(tmp_path, val_classes=("WBC", "RBC", "Platelets"))
    with pytest.raises(UserError, match=r"same categories in the same order, got \['RBC', 'WBC'"):
        prepare_experiment(config(tmp_path, "retinanet"), data=root)


def test_a_test_needs_the_val_split_only(tmp_path):
    root = cells(tmp_path)
    (root / "annotations" / "train.json").unlink()
    path = config(tmp_path, "retinanet")
    cfg = prepare_experiment(path, data=root, train=False).config
    assert cfg.test_dataloader.dataset.ann_file == str(root / "annotations/val.json")
    with pytest.raises(UserError, match="train"):
        prepare_experiment(path, data=root)


def test_tiny_is_small_and_downloads_nothing(tmp_path):
    root = cells(tmp_path, masks=True, size=(640, 480))
    cfg = prepare_experiment(config(tmp_path, "cascade"), data=root, profile="tiny").config
    model = cfg.model
    assert (type_name(model.backbone), model.backbone.depth) == ("ResNet", 18)
    assert model.backbone.frozen_stages == -1 and not model.backbone.norm_eval
    assert model.neck.in_channels == [32, 64, 128, 256]
    assert model.neck.out_channels == model.rpn_head.in_channels == 64
    assert [head.fc_out_channels for head in model.roi_head.bbox_head] == [256] * 3
    assert [stage.sampler.num for stage in model.train_cfg.rcnn] == [64] * 3
    assert model.train_cfg.rpn_proposal.max_per_img == 250
    inits = [node.init_cfg for node in walk(model) if node.get("init_cfg")]
    assert not [init for init in inits if "Pretrained" in str(init)]
    scales = [step.scale for step in walk(cfg.train_dataloader) if type_name(step) == "Resize"]
    assert scales == [(320, 320)], "the profile's, for pictures of 640 x 480"
    loads = [s for s in walk(cfg.train_dataloader) if type_name(s) == "LoadAnnotations"]
    assert loads[0].with_mask


@pytest.mark.parametrize("profile", ["tiny", "small"])
def test_pictures_of_any_size_fit_a_model_of_pictures_of_one_size(profile, tmp_path, monkeypatch):
    """RTMDet's neck joins levels that must be halves of each other."""
    use_random_weights(monkeypatch, tmp_path)
    data = cells(tmp_path, size=(150, 90))
    path = Path(__file__).parents[2] / "configs" / "rtmdet_s_poly1.py"
    cfg = prepare_experiment(path, data=data, profile=profile).config
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    model = MODELS.build(cfg.model)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    inputs = model.data_preprocessor(batch, True)["inputs"]
    assert inputs.shape[2:] == (96, 160)
    losses = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert losses["loss"].isfinite()


def test_tiny_does_not_enlarge_small_pictures(tmp_path):
    cfg = prepare_experiment(
        config(tmp_path, "retinanet"), data=cells(tmp_path), profile="tiny"
    ).config
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        scales = [step.scale for step in walk(loader) if type_name(step) == "Resize"]
        assert scales == [(64, 64)]


def test_options_win(tmp_path):
    options = {
        "train_cfg.max_epochs": 3,
        "model.bbox_head.feat_channels": 16,
        "val_evaluator.classwise": True,
    }
    cfg = prepare_experiment(
        config(tmp_path, "retinanet"), data=cells(tmp_path), profile="tiny", options=options
    ).config
    assert cfg.train_cfg.max_epochs == 3
    assert cfg.model.bbox_head.feat_channels == 16
    assert cfg.val_evaluator.classwise and cfg.val_evaluator.metric == "bbox"
    assert not [s for s in cfg.param_scheduler if s.by_epoch and "end" in s], "it follows"


def test_no_data_set(tmp_path):
    for profile in (None, "tiny"):
        with pytest.raises(UserError) as error:
            prepare_experiment(config(tmp_path, "retinanet"), profile=profile)
        assert str(error.value) == (
            f"there is no data set: {tmp_path}/retinanet.py wants "
            "data/coco/annotations/instances_train2017.json; give a COCO-format folder with "
            "--data DIR, or use the built-in pictures with --demo."
        )
    with pytest.raises(UserError, match="instances_val2017"):
        prepare_experiment(config(tmp_path, "retinanet"), train=False)


def test_bad_configs(tmp_path):
    with pytest.raises(UserError, match="there is no config .*away.py"):
        prepare_experiment(tmp_path / "away.py")
    bad = tmp_path / "bad.py"
    for text, sentence in {
        "model = dict(": "bad.py cannot be read as a config: SyntaxError",
        "_base_ = 'mmdet::retinanet/none.py'": "bad.py cannot be read as a config",
        "x = 1": "bad.py is not the config of a detector: it has no 'model'",
    }.items():
        bad.write_text(text)
        with pytest.raises(UserError, match=sentence):
            prepare_experiment(bad)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt cannot be read as a config"):
        prepare_experiment(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="--cfg-options does not fit"):
        prepare_experiment(
            config(tmp_path, "retinanet"),
            data=cells(tmp_path),
            options={"param_scheduler.9.gamma": 1},
        )


def test_tiny_needs_a_backbone_with_stages(tmp_path):
    path = config(tmp_path, "retinanet", "model = dict(backbone=dict(_delete_=True, type='Mine'))")
    with pytest.raises(UserError, match="'RetinaNet' has no backbone with out_indices"):
        prepare_experiment(path, profile="tiny")


@pytest.mark.parametrize("profile", ["tiny", "small"])
@pytest.mark.parametrize("name", ["two_necks", "balanced", "one_level", "coarse_first"])
def test_the_neck_reads_what_the_small_backbones_give(tmp_path, monkeypatch, name, profile):
    use_random_weights(monkeypatch, tmp_path)
    settings = dict(data=cells(tmp_path), profile=profile)
    cfg = prepare_experiment(config(tmp_path, name), **settings).config
    with DefaultScope.overwrite_default_scope("mmdet"), torch.no_grad():
        model = MODELS.build(cfg.model).eval()
        found = model(torch.zeros(1, 3, 64, 64), mode="tensor")
    assert all(level.isfinite().all() for level in found[0])


def test_a_model_without_a_neck_is_refused(tmp_path):
    path = config(tmp_path, "no_neck")
    with pytest.raises(UserError, match="the neck of 'Mask2Former' is missing"):
        prepare_experiment(path, profile="tiny")


def test_proposals_are_measured_as_they_were(tmp_path):
    cfg = prepare_experiment(config(tmp_path, "proposals"), data=cells(tmp_path)).config
    assert (cfg.val_evaluator.type, cfg.val_evaluator.metric) == ("CocoMetric", "proposal_fast")


OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def test_each_annotation_file_is_opened_once(tmp_path):
    root = cells(tmp_path, masks=True)
    files = [str(root / "annotations" / f"{split}.json") for split in ("train", "val")]
    for file in files:
        os.utime(file, ns=(10**18, 10**18))  # one that was just written may change unseen
    OPENED.clear()
    cfg = prepare_experiment(config(tmp_path, "mask_rcnn"), data=root, profile="tiny").config
    with DefaultScope.overwrite_default_scope("mmdet"):
        for loader in ("train", "val", "test"):
            DATASETS.build(cfg[f"{loader}_dataloader"].dataset)
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            METRICS.build(evaluator)
    assert [OPENED.count(file) for file in files] == [1, 1]


def test_pictures_are_checked_as_the_config_loads_them(tmp_path):
    root = cells(tmp_path)
    path = next((root / "images" / "train").iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).convert("RGB").rotate(90, expand=True).save(path, exif=exif)
    prepare_experiment(config(tmp_path, "retinanet"), data=root)
    raw = "train_dataloader = dict(dataset=dict(pipeline=[" + (
        "dict(type='LoadImageFromFile', color_type='color_ignore_orientation'), "
        "dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]))"
    )
    with pytest.raises(UserError, match="pixels as it is loaded, with its EXIF orientation 6"):
        prepare_experiment(config(tmp_path, "retinanet", raw), data=root)
