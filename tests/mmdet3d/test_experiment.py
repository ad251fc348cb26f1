"""A 3D config meets a KITTI tree: what is read, evaluated, refused and drawn."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("mmdet3d.registry", reason="needs MMDetection3D: run `make setup-3d`")

import lidar_frames
import numpy as np
import torch
from mmdet3d.registry import DATASETS
from mmengine.registry import METRICS, MODELS, DefaultScope
from new_style import new_style
from PIL import Image
from prepared import prepare_experiment

from polyfocal.errors import UserError
from polyfocal.mmdet3d.experiment import Experiment
from polyfocal.mmengine.configs import read_config, type_name

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
POINTPILLARS = CONFIGS / "pointpillars_poly1_kitti.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return lidar_frames.write_tree(tmp_path_factory.mktemp("kitti"))


def test_data_is_the_tree_and_no_info_file(tree):
    cfg = prepare_experiment(POINTPILLARS, data=tree, profile="tiny").config
    for loader, split, length in (("train", "train", 2), ("val", "val", 1), ("test", "val", 1)):
        wanted = cfg[f"{loader}_dataloader"].dataset
        assert (wanted.type, wanted.split) == ("polyfocal.KittiDataset", split)
        assert "ann_file" not in wanted
        with DefaultScope.overwrite_default_scope("mmdet3d"):
            dataset = DATASETS.build(wanted)
        assert len(dataset) == length
        assert dataset.metainfo["classes"] == ["Pedestrian", "Cyclist", "Car"]
        # The frame's number, by which it is evaluated, and not its place in the split.
        assert dataset[0]["data_samples"].sample_idx == (2 if split == "val" else 0)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.type == "polyfocal.KittiMetric"


def test_boxes_come_out_where_they_were_put(tree):
    cfg = prepare_experiment(POINTPILLARS, data=tree, profile="tiny").config
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    truth = dataset[0]["data_samples"].eval_ann_info
    points, boxes, labels = lidar_frames._made(2)
    np.testing.assert_array_equal(truth["gt_labels_3d"], labels)
    found = truth["gt_bboxes_3d"]
    # Labels have two decimals.
    np.testing.assert_allclose(found.gravity_center, boxes[:, :3], atol=0.011)
    np.testing.assert_allclose(found.dims, boxes[:, 3:6], atol=0.006)
    turn = (found.yaw.numpy() - boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(turn, 0, atol=0.006)
    assert len(dataset[0]["inputs"]["points"]) < len(points), "cut to the range"


def test_a_scan_that_changes_while_it_is_trained_on(tmp_path):
    tree = lidar_frames.write_tree(tmp_path / "tree")
    cfg = prepare_experiment(POINTPILLARS, data=tree, profile="tiny").config
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    scan = tree / "training" / "velodyne" / f"{2:06}.bin"
    for content, sentence in (
        (scan.read_bytes()[:-3], r"000002.bin has \d+ bytes, which is no multiple of 16"),
        (b"", r"000002.bin holds no points"),
    ):
        scan.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            dataset[0]
    scan.unlink()
    with pytest.raises(UserError, match=r"000002.bin cannot be read: No such file"):
        dataset[0]


def test_the_full_recipe_leaves_pasting_out_and_says_so(tree):
    experiment = prepare_experiment(POINTPILLARS, data=tree)
    train = experiment.config.train_dataloader.dataset
    assert train.type == "RepeatDataset" and train.dataset.type == "polyfocal.KittiDataset"
    kinds = [step.type for step in train.dataset.pipeline]
    assert "ObjectSample" not in kinds and "GlobalRotScaleTrans" in kinds
    (note,) = experiment.notes
    assert note.startswith("ObjectSample, which pastes in objects of other scans, is left out")


def test_a_note_says_that_val_has_frames_of_train(tmp_path):
    root = lidar_frames.write_tree(tmp_path / "tree")
    (root / "ImageSets" / "val.txt").write_text("000002\n000001\n")
    notes = prepare_experiment(POINTPILLARS, data=root, profile="tiny").notes
    assert notes == ["1 frames are in train and in val: scores on val mean little."]


def test_options_win(tree):
    cfg = prepare_experiment(
        POINTPILLARS, data=tree, profile="tiny", options={"model.bbox_head.loss_cls.epsilon": 0.5}
    ).config
    assert cfg.model.bbox_head.loss_cls.epsilon == 0.5
    with pytest.raises(UserError, match="--cfg-options does not fit .*poly1_kitti.py"):
        prepare_experiment(POINTPILLARS, data=tree, options={"param_scheduler.9.gamma": 1})


def test_what_is_refused(tree, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"there is no data set: .*wants data/kitti/kitti_infos_tra"
    ):
        prepare_experiment(POINTPILLARS)
    with pytest.raises(UserError, match=r"layout, and .*waymo.py is for WaymoDataset: take a conf"):
        prepare_experiment(CONFIGS / "pointpillars_poly1_waymo.py", data=tree)
    with pytest.raises(UserError, match=r"layout, and .*nuscenes.py is for NuScenesDataset: take"):
        prepare_experiment(CONFIGS / "centerpoint_poly1_nuscenes.py", demo=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"needs a GPU, .* its SparseEncoder runs mmcv's sparse con"
    ):
        prepare_experiment(CONFIGS / "second_poly1_kitti.py", data=tree)
    experiment = prepare_experiment(POINTPILLARS, data=tree, train=False)
    with pytest.raises(UserError, match="--tta is for pictures"):
        experiment.use_tta()


def run(name, *arguments):
    """A tool's run as in a process of its own, and its exit status."""

    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main([str(argument) for argument in arguments])


def test_tools_train_test_and_draw(tree, tmp_path, capsys):
    options = ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"]
    for loader in ("train", "val", "test"):
        options += [
            f"{loader}_dataloader.num_workers=0",
            f"{loader}_dataloader.persistent_workers=False",
        ]
    common = ["--data", tree, "--profile", "tiny", "--work-dir", tmp_path / "work"]
    status = run("train", POINTPILLARS, *common, "--cfg-options", *options)
    assert status == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "Car" in shown and "pictures" in shown
    picture = Image.open(tmp_path / "work" / "predictions" / "000002.png")
    assert picture.size[0] > picture.size[1] > 300

    checkpoint = tmp_path / "work" / "epoch_1.pth"
    status = run(
        "test", POINTPILLARS, checkpoint, *common, "--show-dir", "shown", "--cfg-options", *options
    )
    assert status == 0, capsys.readouterr().err
    assert "Car" in capsys.readouterr().out
    (picture,) = (tmp_path / "work").glob("*/shown/000002.png")

    status = run("test", POINTPILLARS, checkpoint, *common, "--tta")
    assert status == 2
    assert capsys.readouterr().err.startswith("error: --tta is for pictures")


def test_a_config_of_3d_without_mmdet3d(monkeypatch):
    def fail(path):
        raise ModuleNotFoundError("mmdet3d is not installed, please install mmdet3d manually.")

    monkeypatch.setattr("polyfocal.mmdet.experiment.Config.fromfile", fail)
    with pytest.raises(UserError, match=r"which is not installed: run `make setup-3d`"):
        read_config(POINTPILLARS)


def test_a_part_of_the_train_split_held_out(tmp_path):
    tree = lidar_frames.write_tree(tmp_path / "tree", splits=(("train", 5), ("val", 1)))
    experiment = prepare_experiment(POINTPILLARS, data=tree, profile="tiny")
    experiment.hold_out(tmp_path / "part")
    frames = {}
    for loader in ("train", "val", "test"):
        with DefaultScope.overwrite_default_scope("mmdet3d"):
            dataset = DATASETS.build(experiment.config[f"{loader}_dataloader"].dataset)
        samples = [dataset[index]["data_samples"] for index in range(len(dataset))]
        frames[loader] = {sample.sample_idx for sample in samples}
    assert frames["train"] | frames["val"] == set(range(5)) and len(frames["val"]) == 1
    assert not frames["train"] & frames["val"] and frames["test"] == frames["val"]
    assert Path(experiment.config.val_evaluator.data_root).samefile(tmp_path / "part")


KITTI = "pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"


def test_a_config_of_the_new_style_is_prepared_as_one_of_the_old(tree, tmp_path):
    """Types are classes and there is no default scope: the class of the model says what it is."""
    (tmp_path / "old.py").write_text(f"_base_ = 'mmdet3d::{KITTI}'")
    (tmp_path / "base_new.py").write_text(new_style(KITTI, package="mmdet3d"))
    (tmp_path / "new.py").write_text(
        "from mmengine.config import read_base\n\n"
        "with read_base():\n    from .base_new import *\n\n"
        "from polyfocal import Poly1FocalLoss\nfrom polyfocal.mmdet3d import Anchor3DHead\n"
        "model['bbox_head'].update(type=Anchor3DHead)\n"
        "model['bbox_head']['loss_cls'].update(type=Poly1FocalLoss, epsilon=1.0)\n"
    )
    mine, right = (
        prepare_experiment(tmp_path / f"{name}.py", data=tree, profile="tiny")
        for name in ("new", "old")
    )
    assert type(mine) is Experiment and mine.notes == right.notes
    for loader in ("train_dataloader", "val_dataloader"):
        steps, expected = (
            [type_name(step) for step in one.config[loader].dataset.pipeline]
            for one in (mine, right)
        )
        assert steps == expected and "PointsRangeFilter" in steps
    assert "RandomFlip3D" in [type_name(s) for s in mine.config.train_dataloader.dataset.pipeline]
    assert mine.config.val_evaluator.type == "polyfocal.KittiMetric"
    model = MODELS.build(mine.config.model)
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        stock = MODELS.build(right.config.model)
    shapes, expected = (
        {name: weight.shape for name, weight in one.state_dict().items()} for one in (model, stock)
    )
    assert shapes == expected
    if not torch.cuda.is_available():
        second = "second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py"
        (tmp_path / "second.py").write_text(new_style(second, package="mmdet3d"))
        with pytest.raises(UserError, match="its SparseEncoder runs mmcv's sparse convolutions"):
            prepare_experiment(tmp_path / "second.py", data=tree)


def test_settings_of_the_metrics_stay(tree, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"_base_ = 'mmdet3d::{KITTI}'\n"
        "val_evaluator = dict(prefix='lab', pcd_limit_range=[0, -9, -3, 9, 9, 1])\n"
        "test_evaluator = dict(submission_prefix='labels')\n"
        "train_dataloader = dict(dataset=dict(times=3))"
    )
    experiment = prepare_experiment(path, data=tree)
    cfg = experiment.config
    val, test = cfg.val_evaluator, cfg.test_evaluator
    assert (val.prefix, test.submission_prefix, "prefix" in test) == ("lab", "labels", False)
    assert val.data_root == test.data_root == str(tree) and val.split == "val"
    assert METRICS.build(val).prefix == "lab"
    assert any("has no pcd_limit_range: left out" in note for note in experiment.notes)
    assert cfg.train_dataloader.dataset.times == 3


def test_class_weights_from_the_objects_in_range(tree):
    key = "model.bbox_head.loss_cls"
    options = {f"{key}.class_weight": "balanced", f"{key}.alpha": "balanced"}
    experiment = prepare_experiment(POINTPILLARS, data=tree, profile="tiny", options=options)
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        dataset = DATASETS.build(experiment.config.train_dataloader.dataset)
    counts = np.array(dataset.num_ins_per_cat, dtype=float)
    there = counts > 0
    weights = np.ones(3)
    weights[there] = counts.sum() / (there.sum() * counts[there])
    loss = experiment.config.model.bbox_head.loss_cls
    np.testing.assert_allclose(loss.class_weight, weights, rtol=1e-5)
    np.testing.assert_allclose(loss.alpha, weights / (weights + 3), rtol=1e-5)
