"""Frames for the tests of 3D heads: real ones of KITTI where they lie, else points and boxes."""

import json
from pathlib import Path

import numpy as np
import torch
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmengine.structures import InstanceData

KITTI_MINI = Path(__file__).resolve().parents[2] / "../shared/data/kitti_mini"
CLASSES = ("Pedestrian", "Cyclist", "Car")
SIZES = np.array([[0.8, 0.6, 1.73], [1.76, 0.6, 1.73], [3.9, 1.6, 1.56]])


def _real(name):
    points = np.fromfile(KITTI_MINI / f"training/velodyne/{name}.bin", np.float32).reshape(-1, 4)
    frames = json.loads((KITTI_MINI / "annotations/trainval.json").read_text())
    (frame,) = (frame for frame in frames if frame["frame"] == name)
    objects = [item for item in frame["objects"] if item["type"] in CLASSES]
    boxes = np.array([item["box_lidar"] for item in objects]).reshape(-1, 7)
    return points, boxes, [CLASSES.index(item["type"]) for item in objects]


def _made(seed):
    """Points on the ground and in boxes: enough for anchors to be matched."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, 12)
    ahead = random.uniform(8, 45, 12)
    # Where a camera sees them.
    places = np.stack([ahead, (ahead - 4) * random.uniform(-0.45, 0.45, 12)], axis=1)
    boxes = np.concatenate(
        [places, np.full((12, 1), -0.9), SIZES[labels], random.uniform(-3, 3, (12, 1))], axis=1
    )
    ground = random.uniform((0, -30, -1.75), (60, 30, -1.65), (8000, 3))
    inside = (boxes[:, None, :3] + random.uniform(-0.4, 0.4, (12, 80, 3))).reshape(-1, 3)
    points = np.concatenate([ground, inside])
    return np.concatenate([points, random.random((len(points), 1))], axis=1), boxes, list(labels)


def batch(columns=4, box_columns=7):
    """Two frames as a model's data_preprocessor takes them: pedestrians, cyclists and cars.

    Args:
        columns: Of the points; more than 4 are filled with zeros.
        box_columns: Of the boxes; 9 adds a velocity of zero.
    """
    real = KITTI_MINI.is_dir()
    frames = [_real("000010"), _real("000000")] if real else [_made(0), _made(1)]
    inputs, samples = [], []
    for points, boxes, labels in frames:
        points = np.pad(points, ((0, 0), (0, columns - 4)))
        boxes = np.pad(boxes, ((0, 0), (0, box_columns - 7)))
        inputs.append(torch.tensor(points, dtype=torch.float32))
        sample = Det3DDataSample(metainfo={"box_type_3d": LiDARInstance3DBoxes})
        sample.gt_instances_3d = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(
                torch.tensor(boxes, dtype=torch.float32),
                box_dim=box_columns,
                origin=(0.5, 0.5, 0.5),
            ),
            labels_3d=torch.tensor(labels, dtype=torch.int64),
        )
        samples.append(sample)
    return {"inputs": {"points": inputs}, "data_samples": samples}


def write_tree(root, splits=(("train", 2), ("val", 1))):
    """A folder in KITTI's layout with made frames, its camera in the scanner's place."""
    for folder in ("velodyne", "label_2", "calib"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets").mkdir(exist_ok=True)
    number = 0
    for split, count in splits:
        names = [f"{number + index:06d}" for index in range(count)]
        number += count
        (root / f"ImageSets/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            points, boxes, labels = _made(int(name))
            points.astype(np.float32).tofile(root / f"training/velodyne/{name}.bin")
            lines = [_label(box, CLASSES[label]) for box, label in zip(boxes, labels, strict=True)]
            (root / f"training/label_2/{name}.txt").write_text("".join(lines))
            (root / f"training/calib/{name}.txt").write_text(CALIB)
    return root


_PROJECTION = np.array([[700.0, 0, 620, 0], [0, 700, 180, 0], [0, 0, 1, 0]])
CALIB = "".join(
    f"{key}: {' '.join(map(str, values))}\n"
    for key, values in {
        **{f"P{camera}": _PROJECTION.ravel() for camera in range(4)},
        "R0_rect": np.eye(3).ravel(),
        "Tr_velo_to_cam": [0, -1, 0, 0, 0, 0, -1, 0, 1, 0, 0, 0],
        "Tr_imu_to_velo": np.eye(3, 4).ravel(),
    }.items()
)


def _label(box, name):
    x, y, z, length, width, height, yaw = box
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1)
    along, across, up = corners * np.array([[length], [width], [height]]) / 2
    camera = np.stack(
        [
            -(y + np.sin(yaw) * along + np.cos(yaw) * across),
            -(z + up),
            x + np.cos(yaw) * along - np.sin(yaw) * across,
            np.ones(8),
        ]
    )
    u, v, depth = _PROJECTION @ camera
    left, right = np.clip([(u / depth).min(), (u / depth).max()], 0, 1241)
    top, bottom = np.clip([(v / depth).min(), (v / depth).max()], 0, 374)
    turn = (-yaw - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
    alpha = (turn - np.arctan2(-y, x) + np.pi) % (2 * np.pi) - np.pi
    return (
        f"{name} 0.00 0 {alpha:.2f} {left:.2f} {top:.2f} {right:.2f} {bottom:.2f} {height:.2f}"
        f" {width:.2f} {length:.2f} {-y:.2f} {height / 2 - z:.2f} {x:.2f} {turn:.2f}\n"
    )
