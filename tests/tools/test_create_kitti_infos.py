"""create_kitti_infos: the files that it writes, and that it writes all or none."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from polyfocal import kitti
from polyfocal.commands import create_kitti_infos as tool
from polyfocal.demo.lidar_scenes import LidarScenes, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "set", LidarScenes(num_train=2, num_val=1))


def test_writes_what_load_infos_returns(tree, tmp_path, capsys):
    out = tmp_path / "new/infos"
    assert tool.main([str(tree), "--out", str(out)]) == 0
    names = sorted(file.name for file in out.iterdir())
    assert names == ["kitti_infos_train.pkl", "kitti_infos_val.pkl"]
    for split in ("train", "val"):
        # Our own, written a moment ago.
        found = pickle.loads((out / f"kitti_infos_{split}.pkl").read_bytes())
        assert found == kitti.load_infos(tree, split)
    assert "kitti_infos_train.pkl: 2 frames, " in capsys.readouterr().out


def test_mmdet3d_reads_them(tree):
    datasets = pytest.importorskip("mmdet3d.datasets", reason="needs MMDetection3D")
    assert tool.main([str(tree)]) == 0
    dataset = datasets.KittiDataset(
        data_root=str(tree),
        ann_file="kitti_infos_val.pkl",
        data_prefix={"pts": "training/velodyne"},
        metainfo={"classes": ("Pedestrian", "Cyclist", "Car")},
        test_mode=True,
    )
    info = dataset.get_data_info(0)
    assert Path(info["lidar_path"]) == tree / "training/velodyne/000002.bin"
    (wanted,) = kitti.load_infos(tree, "val")["data_list"]
    kept = [item for item in wanted["instances"] if item["bbox_label"] >= 0]
    truth = info["eval_ann_info"]
    assert truth["difficulty"].tolist() == [item["difficulty"] for item in kept]
    assert truth["num_lidar_pts"].tolist() == [item["num_lidar_pts"] for item in kept]
    # The scanner and the camera of these scenes are not askew: both ways to turn a box agree.
    lidar2cam = wanted["images"]["CAM2"]["lidar2cam"]
    boxes = kitti.boxes_in_lidar(np.array([item["bbox_3d"] for item in kept]), np.array(lidar2cam))
    found = truth["gt_bboxes_3d"]
    assert abs(boxes[:, :3] - found.gravity_center.numpy()).max() < 1e-5
    assert abs(boxes[:, 3:6] - found.dims.numpy()).max() < 1e-5
    np.testing.assert_allclose(np.cos(boxes[:, 6] - found.yaw.numpy()), 1, atol=1e-6)


def test_a_bad_split_leaves_no_file(tree, tmp_path, capsys):
    (tree / "training/velodyne/000002.bin").write_bytes(b"123")
    out = tmp_path / "infos"
    assert tool.main([str(tree), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "000002.bin has 3 bytes, which is no multiple of 16" in error
    assert not out.exists()


def test_nothing_to_describe_or_nowhere_to_write(tree, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert (
        "has none of ImageSets/train.txt, val.txt, trainval.txt, test.txt"
        in capsys.readouterr().err
    )
    (tmp_path / "file").write_text("")
    assert tool.main([str(tree), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/file/kitti_infos_train.pkl cannot be written: " in error
    assert error.count("\n") == 1
