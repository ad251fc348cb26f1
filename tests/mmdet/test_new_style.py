"""Configs of MMEngine's new style: imports instead of names, and no default scope."""

import json
from collections import OrderedDict

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")

from cells import CLASSES, cells
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS, MODELS, DefaultScope
from new_style import new_style
from prepared import prepare_experiment

import polyfocal.mmengine
from polyfocal.errors import UserError
from polyfocal.mmengine import runs
from polyfocal.mmengine.configs import class_of, evaluators, type_name, walk

STOCK = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
}
POLY1 = (
    "from polyfocal import Poly1FocalLoss\n"
    "model['bbox_head'].update(\n"
    "    loss_cls=dict(type=Poly1FocalLoss, use_sigmoid=True, epsilon=1.0))\n"
)


@pytest.fixture(autouse=True)
def no_scope_of_another_training(monkeypatch):
    """A training leaves its default scope in the process; a person's has none at first."""
    monkeypatch.setattr(DefaultScope, "_instance_dict", OrderedDict())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return cells(tmp_path_factory.mktemp("data") / "cells", masks=True, pictures=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


def config(folder, name, more="", default_scope=None):
    base = folder / f"base_{name}.py"
    base.write_text(new_style(STOCK[name], default_scope))
    path = folder / f"{name}.py"
    path.write_text(
        "from mmengine.config import read_base\n\n"
        f"with read_base():\n    from .base_{name} import *\n\n{more}"
    )
    return path


def settings(node):
    """A config without its types, of which the two styles have other names."""
    if isinstance(node, dict):
        left_out = ("type", "_scope_", "default_scope")
        return {key: settings(value) for key, value in node.items() if key not in left_out}
    if isinstance(node, list | tuple):
        return [settings(value) for value in node]
    return node


@pytest.mark.parametrize(
    ("name", "scope"), [*((name, None) for name in STOCK), ("faster_rcnn", "mmdet")]
)
def test_prepared_as_in_the_old_style(folder, data, name, scope):
    profile = None if name == "rtmdet" else "tiny"  # its backbone is refused
    old = folder / f"{name}_old.py"
    old.write_text(f"_base_ = 'mmdet::{STOCK[name]}'")
    mine = prepare_experiment(config(folder, name, default_scope=scope), data=data, profile=profile)
    right = prepare_experiment(old, data=data, profile=profile)
    assert mine.notes == right.notes and mine.quality == right.quality
    for key in ("model", "train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator"):
        assert settings(mine.config[key]) == settings(right.config[key]), key
    for loader in ("train_dataloader", "val_dataloader"):
        steps, expected = (
            [type_name(step) for step in one.config[loader].dataset.pipeline]
            for one in (mine, right)
        )
        assert steps == expected
    assert mine.config.val_evaluator.type == "polyfocal.CocoMetric"
    with DefaultScope.overwrite_default_scope(scope):
        MODELS.build(mine.config.model)


def test_a_demo_mirrors_no_digit(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = prepare_experiment(config(folder, "retinanet"), demo=True).config
    flips = [step for step in walk(cfg.train_dataloader) if type_name(step) == "RandomFlip"]
    assert [flip.prob for flip in flips] == [0.0]


def test_train_test_and_tune(folder, data, tmp_path, capsys):
    """On its own data set, without --data: a table, the results, and one evaluation."""
    where = (
        f"for name, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):\n"
        f"    globals()[f'{{name}}_dataloader']['dataset'].update(\n"
        f"        data_root='{data}/', ann_file=f'annotations/{{split}}.json',\n"
        f"        data_prefix=dict(img=f'images/{{split}}/'),\n"
        f"        metainfo=dict(classes={CLASSES}))\n"
        f"val_evaluator.update(ann_file='{data}/annotations/val.json')\n"
        f"test_evaluator = val_evaluator\n"
        f"model['bbox_head'].update(num_classes=3)\n"
    )
    path = config(folder, "retinanet", POLY1 + where)
    options = {
        "train_cfg.max_epochs": 1,
        "train_cfg.val_interval": 1,
        "work_dir": str(tmp_path / "run"),
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "test_dataloader.num_workers": 0,
    }
    experiment = prepare_experiment(path, profile="tiny", options=options)
    assert experiment.config.model.bbox_head.loss_cls.type == "polyfocal.Poly1FocalLoss"
    measured = runs.train(experiment)
    shown = capsys.readouterr().out
    assert "training on 18 objects in 6 samples: RBC (6), WBC (6), Platelets (6)" in shown
    assert "COCO metrics" in shown and shown.count("Epoch(val)") == 1
    assert json.loads((tmp_path / "run" / "val.bbox.json").read_text()) is not None
    (log,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    assert sum("coco/bbox_mAP" in line for line in log.read_text().splitlines()) == 1
    # The config in the work directory, whose types are dotted paths, is one too.
    (kept,) = (tmp_path / "run").glob("*/vis_data/config.py")
    again = prepare_experiment(kept, options=options, train=False)
    again.keep_detections(str(tmp_path / "found.json"))
    tested = runs.test(again, str(tmp_path / "run" / "epoch_1.pth"))
    assert tested == pytest.approx({k: v for k, v in measured.items() if k in tested}, abs=1e-6)
    assert (tmp_path / "found.bbox.json").is_file()
    # What a search would write is a config as well.
    assert again.settings()["epsilon"].value == 1.0
    prepare_experiment(path, profile="tiny").write_variant(
        tmp_path / "best.py", {"epsilon": 0.25}, ["found"]
    )
    best = prepare_experiment(tmp_path / "best.py", data=data, profile="tiny").config
    assert best.model.bbox_head.loss_cls.epsilon == 0.25
    assert best.train_dataloader.dataset.ann_file == str(data / "annotations/train.json")


def test_a_misspelt_import_is_one_sentence(folder, data):
    more = "from mmdet.models import RetinaNett\nmodel.update(type=RetinaNett)"
    with pytest.raises(UserError) as caught:
        prepare_experiment(config(folder, "retinanet", more), data=data)
    sentence = str(caught.value)
    assert "retinanet.py cannot be read as a config: ImportError" in sentence
    assert "RetinaNett" in sentence and "\n" not in sentence
    away = "from mmdett.models import RetinaNet as Away\nmodel['neck'].update(type=Away)"
    with pytest.raises(UserError, match="cannot be read as a config: .*mmdett"):
        prepare_experiment(config(folder, "retinanet", away), data=data)


def test_a_loss_imported_from_polyfocal_is_the_registered_one(folder, data):
    """It follows the Runner's progress, and builds its bias model from a dictionary."""
    more = (
        "from polyfocal import CyclicalFocalLoss\n"
        "model['bbox_head'].update(loss_cls=dict(type=CyclicalFocalLoss, use_sigmoid=True))"
    )
    cfg = prepare_experiment(config(folder, "retinanet", more), data=data).config
    assert class_of(cfg.model.bbox_head.loss_cls, MODELS, None) is (
        polyfocal.mmengine.losses.CyclicalFocalLoss
    )


def test_all_ways_to_name_a_class():
    for kind in (
        "CocoMetric",
        "mmdet.CocoMetric",
        "mmdet.evaluation.CocoMetric",
        "mmdet.evaluation.metrics.coco_metric.CocoMetric",
        MMDetCocoMetric,
    ):
        assert class_of({"type": kind}, METRICS, "mmdet") is MMDetCocoMetric
        assert type_name({"type": kind}) == "CocoMetric"
        if kind != "CocoMetric":
            assert class_of({"type": kind}, METRICS, None) is MMDetCocoMetric
    assert class_of({"type": "CocoMetric", "_scope_": "mmdet"}, METRICS, None) is MMDetCocoMetric
    for kind in ("NoMetric", None, len):
        assert class_of({"type": kind}, METRICS, "mmdet") is None


def test_an_evaluator_written_out():
    metrics = [{"type": "CocoMetric"}, {"type": "VOCMetric"}]
    for written in (metrics, {"type": "Evaluator", "metrics": metrics}):
        cfg = Config({"val_evaluator": written})
        assert [type_name(node) for node in evaluators(cfg, "val")] == ["CocoMetric", "VOCMetric"]
    assert evaluators(Config({"val_evaluator": ConfigDict(metrics[0])}), "val") == metrics[:1]
    assert evaluators(Config({"val_evaluator": None}), "val") == []
