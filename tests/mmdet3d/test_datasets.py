"""A KITTI tree as a data set: what it counts is what a training gets."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet3d")

from mmengine.registry import init_default_scope

from polyfocal.demo.lidar_scenes import LidarScenes, write
from polyfocal.mmdet3d.datasets import KittiDataset

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
