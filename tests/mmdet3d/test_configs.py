"""Every shipped 3D config: it reads well, builds, and its tiny profile learns and predicts."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet3d.registry", reason="needs MMDetection3D: run `make setup-3d`")

import lidar_frames
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import polyfocal
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss
from polyfocal.mmdet3d.tiny import RANGE, use_tiny_profile

CONFIGS = {
    path.stem: path
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    if "mmdet3d::" in path.read_text()
}
LOSSES = {
    "pointpillars_poly1_kitti": polyfocal.Poly1FocalLoss,
    "pointpillars_focal_kitti": None,
    "pointpillars_cyclical_kitti": polyfocal.CyclicalFocalLoss,
    "second_poly1_kitti": polyfocal.Poly1FocalLoss,
    "pointpillars_poly1_waymo": polyfocal.Poly1FocalLoss,
    "pointpillars_focal_waymo": None,
    "centerpoint_poly1_nuscenes": polyfocal.GaussianPoly1FocalLoss,
}
ON_A_CPU = sorted(LOSSES.keys() - {"second_poly1_kitti"})


@pytest.fixture(autouse=True)
def mmdet3d_scope():
    with DefaultScope.overwrite_default_scope("mmdet3d"):
        yield


def head_of(model):
    return model.bbox_head if hasattr(model, "bbox_head") else model.pts_bbox_head


def test_all_are_there():
    assert CONFIGS.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_reads_well_and_builds(name):
    text = CONFIGS[name].read_text()
    assert re.search(r'^_base_ = "mmdet3d::', text, re.MULTILINE)
    assert len(text.splitlines()) <= 15
    if "poly1" in name:
        assert re.search(r"epsilon=-?\d", text), "the value is written"
        assert re.search(r"^# epsilon: ", text, re.MULTILINE), "and its reason"

    cfg = Config.fromfile(CONFIGS[name])
    head = head_of(MODELS.build(cfg.model))
    if LOSSES[name] is None:
        assert not isinstance(head.loss_cls, ClassificationLoss)
    else:
        assert isinstance(head.loss_cls, LOSSES[name])
    if isinstance(head.loss_cls, ClassificationLoss):
        assert not head.sampling and head.loss_cls.alpha == 0.25


@pytest.mark.parametrize("name", ON_A_CPU)
def test_tiny_profile_trains_and_predicts(name):
    torch.manual_seed(0)
    cfg = Config.fromfile(CONFIGS[name])
    full = sum(weight.numel() for weight in MODELS.build(cfg.model).parameters())
    use_tiny_profile(cfg)
    assert cfg.train_dataloader.batch_size == 2
    hub = MessageHub.get_current_instance()
    hub.update_info_dict(dict(iter=0, max_iters=10, epoch=0, max_epochs=1))
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert sum(weight.numel() for weight in model.parameters()) < full / 3

    nuscenes = "nuscenes" in name
    batch = lidar_frames.batch(
        columns=4 if "kitti" in name else 5, box_columns=9 if nuscenes else 7
    )
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    log = model.train_step(batch, build_optim_wrapper(model, cfg.optim_wrapper))
    assert log["loss"].isfinite() and log["loss"] > 0
    still = [key for key, weight in model.named_parameters() if weight.equal(before[key])]
    # CenterPoint has branches for classes that these frames do not hold.
    assert not [key for key in still if "task_heads" not in key], "all of it learns"
    assert not [key for key in still if "heatmap" in key]

    model.eval()
    with torch.no_grad():
        samples = model.test_step(lidar_frames.batch(columns=4 if "kitti" in name else 5))
    for sample in samples:
        found = sample.pred_instances_3d
        assert found.bboxes_3d.tensor.shape == (len(found), 9 if nuscenes else 7)
        assert found.bboxes_3d.tensor.isfinite().all()
        assert ((found.scores_3d >= 0) & (found.scores_3d <= 1)).all()


def test_tiny_profile_cuts_everything_to_one_range():
    cfg = Config.fromfile(CONFIGS["pointpillars_poly1_kitti"])
    use_tiny_profile(cfg)
    model = cfg.model
    limits = [0.0, -RANGE[1], -3, RANGE[0], RANGE[1], 1]
    assert model.data_preprocessor.voxel_layer.point_cloud_range == pytest.approx(limits)
    assert model.voxel_encoder.point_cloud_range == pytest.approx(limits)
    assert model.voxel_encoder.in_channels == 4, "the points' own"
    assert model.middle_encoder.output_shape == [256, 320], "voxels of 0.16 m"
    for low in model.bbox_head.anchor_generator.ranges:
        assert low[:2] + low[3:5] == pytest.approx([0, -RANGE[1], RANGE[0], RANGE[1]])
    assert [low[2] for low in model.bbox_head.anchor_generator.ranges] == [-0.6, -0.6, -1.78]
    train, val = cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline
    assert [step.type for step in train] == [
        "LoadPointsFromFile",
        "LoadAnnotations3D",
        "RandomFlip3D",
        "PointsRangeFilter",
        "ObjectRangeFilter",
        "PointShuffle",
        "Pack3DDetInputs",
    ]
    assert [step.type for step in val] == [
        "LoadPointsFromFile",
        "PointsRangeFilter",
        "Pack3DDetInputs",
    ]
    for step in [*train, *val]:
        if "point_cloud_range" in step:
            assert step.point_cloud_range == pytest.approx(limits)


def test_tiny_profile_never_reaches_farther_than_the_config():
    cfg = Config.fromfile(CONFIGS["pointpillars_poly1_kitti"])
    # 40.3 m are not whole cells of eight voxels of 0.16 m; 31 of them are 39.68 m.
    cfg.model.data_preprocessor.voxel_layer.point_cloud_range = [0.0, -10.24, -3, 40.3, 10.24, 1]
    use_tiny_profile(cfg)
    limits = [0.0, -10.24, -3, 39.68, 10.24, 1]
    assert cfg.model.voxel_encoder.point_cloud_range == pytest.approx(limits)
    assert cfg.model.middle_encoder.output_shape == [128, 248]


def test_tiny_profile_needs_pillars():
    cfg = Config.fromfile(CONFIGS["second_poly1_kitti"])
    with pytest.raises(UserError, match=r"on pillars .* 'VoxelNet' has no PointPillarsScatter"):
        use_tiny_profile(cfg)
