"""A KITTI tree as a data set: what it counts is what a training gets; its files of detections."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet3d")

import lidar_frames
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.registry import init_default_scope

from polyfocal.demo.lidar_scenes import LidarScenes, write
from polyfocal.errors import UserError
from polyfocal.mmdet3d.datasets import KittiDataset
from polyfocal.mmdet3d.metrics import KittiMetric

CLASSES = ("Pedestrian", "Cyclist", "Car")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("scans") / "tree",
        LidarScenes(num_train=4, num_val=1, cars=(4, 6), pedestrians=(2, 3)),
    )


@pytest.mark.parametrize("reach", [100.0, 25.0, 1.0])
def test_objects_that_the_pipeline_leaves_out_are_not_counted(tree: Path, reach: float) -> None:
    init_default_scope("mmdet3d")
    limits = [0, -reach, -3, reach, reach, 1]
    pipeline = [
        dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
        dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
        dict(type="ObjectRangeFilter", point_cloud_range=limits),
        dict(type="ObjectNameFilter", classes=["Pedestrian", "Cyclist", "Car"]),
        dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
    ]
    dataset = KittiDataset(
        data_root=str(tree),
        split="train",
        pipeline=pipeline,
        metainfo=dict(classes=CLASSES),
        box_type_3d="LiDAR",
        filter_empty_gt=False,
    )
    trained = [0, 0, 0]
    for index in range(len(dataset)):
        for label in dataset[index]["data_samples"].gt_instances_3d.labels_3d:
            trained[label] += 1
    assert dataset.num_ins_per_cat == trained
    assert (sum(trained) > 15) == (reach == 100.0) and (sum(trained) == 0) == (reach == 1.0)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A frame of val with ten digits, as raw recordings have, and one of test with six."""
    root = lidar_frames.write_tree(tmp_path / "tree")
    for file in (root / "training").glob("*/000002.*"):
        if file.parent.name != "label_2":
            target = root / "testing" / file.parent.name / f"000007{file.suffix}"
            target.parent.mkdir(parents=True)
            target.write_bytes(file.read_bytes())
        file.rename(file.with_stem("0000000002"))
    (root / "ImageSets" / "val.txt").write_text("0000000002\n")
    (root / "ImageSets" / "test.txt").write_text("000007\n")
    return root


@pytest.mark.parametrize(("split", "name"), [("val", "0000000002"), ("test", "000007")])
def test_files_of_detections_have_the_names_of_the_frames(odd: Path, split: str, name: str) -> None:
    """The scanner's (15, 2, -1.6) is the camera's (-2, 1.6, 15); yaw 0 is rotation_y -pi / 2."""
    init_default_scope("mmdet3d")
    pipeline = [
        dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
        dict(type="Pack3DDetInputs", keys=["points"]),
    ]
    data = dict(data_root=str(odd), split=split)
    dataset = KittiDataset(
        **data, pipeline=pipeline, metainfo=dict(classes=CLASSES), test_mode=True
    )
    (sample,) = (dataset[index]["data_samples"].to_dict() for index in range(len(dataset)))
    sample["pred_instances_3d"] = dict(
        bboxes_3d=LiDARInstance3DBoxes(torch.tensor([[15.0, 2, -1.6, 3.9, 1.6, 1.5, 0]])),
        labels_3d=torch.tensor([2]),
        scores_3d=torch.tensor([0.9]),
    )
    out = odd / "out"
    metric = KittiMetric(**data, submission_prefix=str(out))
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process(None, [sample])
    numbers = metric.evaluate(1)
    assert bool(numbers) == (split == "val") == (metric.table() is not None)
    assert [file.name for file in out.iterdir()] == [f"{name}.txt"]
    kind, *fields = (out / f"{name}.txt").read_text().split()
    wanted = [1.5, 1.6, 3.9, -2, 1.6, 15, -1.5708, 0.9]
    assert kind == "Car" and list(map(float, fields[7:])) == pytest.approx(wanted, abs=1e-4)


def test_a_split_without_labels_is_neither_evaluated_nor_trained_on(odd: Path) -> None:
    with pytest.raises(UserError, match="^KittiMetric: the split test has no labels to evaluate w"):
        KittiMetric(str(odd), "test")
    with pytest.raises(UserError, match="^KittiDataset: the split test has no labels to train on"):
        KittiDataset(str(odd), "test")
