"""KITTI's and Waymo's average precision as metrics of MMEngine, without a GPU."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet3d.structures import BaseInstance3DBoxes, Box3DMode, points_cam2img
from mmengine.evaluator import BaseMetric
from rich.table import Table

from polyfocal.data import kitti
from polyfocal.errors import UserError
from polyfocal.mmdet3d.evaluation import (
    DIFFICULTIES,
    STRICTNESS,
    Boxes,
    Objects,
    kitti_ap,
    waymo_ap,
)
from polyfocal.mmengine.registry import METRICS

_CAMERA = "CAM2"
# Least depth in metres of corners in the picture: those behind the camera have no place in it.
_LEAST_DEPTH = 0.1


@METRICS.register_module()
class KittiMetric(BaseMetric):
    """AP in the picture, from above and in 3D, and AOS, see :func:`..evaluation.kitti_ap`.

    The keys are those of MMDetection3D's ``KittiMetric``, such as
    ``pred_instances_3d/KITTI/Car_3D_AP40_moderate_strict``; -1 without objects.

    Args:
        data_root: Folder in KITTI's layout, see :mod:`polyfocal.kitti`.
        split: Split of the folder, for instance ``"val"``. ``"test"``, which has no labels, is
            not evaluated: its detections are only written.
        submission_prefix: Folder for the detections as label files of KITTI, one per frame, of
            the frame's name.
        collect_device: Where several processes gather their results.
        prefix: In front of the keys; None for ``"Kitti metric"``.
    """

    default_prefix = "Kitti metric"

    def __init__(
        self,
        data_root: str,
        split: str,
        submission_prefix: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if split == "test" and submission_prefix is None:
            raise UserError(
                "KittiMetric: the split test has no labels to evaluate with: take another split, or"
                " give submission_prefix, a folder for the detections."
            )
        self.labelled = split != "test"
        infos = kitti.load_split(data_root, split).infos
        self.names = {label: name for name, label in infos["metainfo"]["categories"].items()}
        self.infos = {info["sample_idx"]: info for info in infos["data_list"]}
        self.submission_prefix = submission_prefix
        self.numbers: dict[str, float] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the detections of a batch, in the coordinates of the camera."""
        for sample in data_samples:
            index = sample["sample_idx"]
            if index not in self.infos:
                raise UserError(
                    f"the detections of frame {index} cannot be evaluated: the split has no such"
                    " frame."
                )
            found = sample["pred_instances_3d"]
            self.results.append((index, self._objects(self.infos[index], found)))

    def compute_metrics(self, results: list[tuple[int, Objects]]) -> dict[str, float]:
        """Evaluate all frames, if they have labels."""
        if self.submission_prefix is not None:
            for index, found in results:
                name = Path(self.infos[index]["lidar_points"]["lidar_path"]).stem
                _write_labels(Path(self.submission_prefix) / f"{name}.txt", found)
        if not self.labelled:
            return {}
        truth = [self._truth(self.infos[index]) for index, _ in results]
        detections = [found for _, found in results]
        self.numbers = kitti_ap(truth, detections, self.dataset_meta["classes"])
        return {
            f"pred_instances_3d/KITTI/{key}": -1.0 if math.isnan(value) else value
            for key, value in self.numbers.items()
        }

    def table(self) -> Table | None:
        """AP at 40 points of each class, or None before an evaluation."""
        if not self.numbers:
            return None
        table = Table("AP40, strict (loose)", *DIFFICULTIES)
        for name in self.dataset_meta["classes"]:
            for kind in ("2D", "AOS", "BEV", "3D"):
                cells = []
                for level in DIFFICULTIES:
                    key = f"{name}_{kind}_AP40_{level}"
                    strict, loose = (self.numbers[f"{key}_{s}"] for s in STRICTNESS)
                    cell = "-" if math.isnan(strict) else f"{strict:.1f}"
                    if kind in ("BEV", "3D") and not math.isnan(loose):
                        cell += f" ({loose:.1f})"
                    cells.append(cell)
                table.add_row(f"{name} {kind}", *cells)
        return table

    def _truth(self, info: dict[str, Any]) -> Objects:
        instances = info["instances"]

        def column(key: str, *shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
            values = [instance[key] for instance in instances]
            return np.array(values, dtype=np.float64).reshape(-1, *shape)

        return Objects(
            names=np.array([self.names[one["bbox_label"]] for one in instances], dtype=np.str_),
            boxes=column("bbox_3d", 7),
            image_boxes=column("bbox", 4),
            alpha=column("alpha"),
            truncated=column("truncated"),
            occluded=column("occluded"),
        )

    def _objects(self, info: dict[str, Any], found: Any) -> Objects:
        """The detections that the camera sees."""
        image = info["images"][_CAMERA]
        boxes: BaseInstance3DBoxes = found["bboxes_3d"].to("cpu")
        to_camera = np.array(image["lidar2cam"], dtype=np.float32)
        in_camera = boxes.convert_to(Box3DMode.CAM, to_camera)
        in_camera.limit_yaw(offset=0.5, period=2 * math.pi)
        corners = in_camera.corners.clone()
        corners[..., 2].clamp_(min=_LEAST_DEPTH)
        projection = torch.tensor(image["cam2img"], dtype=torch.float32)
        pixels = points_cam2img(corners.reshape(-1, 3), projection).reshape(-1, 8, 2)
        limits = torch.tensor([image["width"], image["height"]], dtype=torch.float32)
        low, high = pixels.amin(1), pixels.amax(1)
        seen = (low < limits).all(1) & (high > 0).all(1) & (in_camera.tensor[:, 2] > 0)
        image_boxes = torch.cat([low.clamp(min=0), torch.minimum(high, limits)], dim=1)
        kept = in_camera.tensor[seen, :7].double().numpy()
        labels = found["labels_3d"].to("cpu")[seen]
        classes = self.dataset_meta["classes"]
        return Objects(
            names=np.array([classes[label] for label in labels], dtype=np.str_),
            boxes=kept,
            image_boxes=image_boxes[seen].double().numpy(),
            alpha=kept[:, 6] - np.arctan2(kept[:, 0], kept[:, 2]),
            scores=found["scores_3d"].to("cpu")[seen].double().numpy(),
        )


@METRICS.register_module()
class WaymoMetric(BaseMetric):
    """AP and APH of both levels, see :func:`..evaluation.waymo_ap`, of any LiDAR data set.

    The ground truth comes with the samples, including the number of points of each object. The keys
    are those of MMDetection3D's ``WaymoMetric``, such as ``Vehicle/L1 mAPH``; -1 without objects.

    Args:
        overlap: Least intersection over union in 3D; None for 0.7 for vehicles and cars, 0.5 for
            all others.
        collect_device: Where several processes gather their results.
        prefix: In front of the keys; None for ``"Waymo metric"``.
    """

    default_prefix = "Waymo metric"

    def __init__(
        self, overlap: float | None = None, collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if overlap is not None and not 0 < overlap < 1:
            raise UserError(f"overlap={overlap}: expected a number between 0 and 1")
        self.overlap = overlap

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the objects and the detections of a batch."""
        classes = np.array(self.dataset_meta["classes"], dtype=np.str_)
        for sample in data_samples:
            truth, found = sample["eval_ann_info"], sample["pred_instances_3d"]
            if "num_lidar_pts" not in truth:
                raise UserError(
                    "WaymoMetric tells the levels apart by the points of an object, and the data"
                    " set's annotations have no num_lidar_pts."
                )
            labels = np.asarray(truth["gt_labels_3d"])
            mine = labels >= 0
            self.results.append(
                (
                    Boxes(
                        names=classes[labels[mine]],
                        boxes=_centred(truth["gt_bboxes_3d"])[mine],
                        points=np.asarray(truth["num_lidar_pts"], dtype=np.float64)[mine],
                    ),
                    Boxes(
                        names=classes[found["labels_3d"].cpu().numpy()],
                        boxes=_centred(found["bboxes_3d"]),
                        scores=found["scores_3d"].cpu().double().numpy(),
                    ),
                )
            )

    def compute_metrics(self, results: list[tuple[Boxes, Boxes]]) -> dict[str, float]:
        """Evaluate all frames."""
        truth, detections = zip(*results, strict=True)
        numbers = waymo_ap(truth, detections, self.dataset_meta["classes"], self.overlap)
        return {key: -1.0 if math.isnan(value) else value for key, value in numbers.items()}


def _centred(boxes: BaseInstance3DBoxes) -> np.ndarray[Any, np.dtype[np.float64]]:
    centre = boxes.gravity_center
    return torch.cat([centre, boxes.tensor[:, 3:7]], dim=1).cpu().double().numpy()


def _write_labels(file: Path, found: Objects) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, alpha, corners, box, score in zip(
        found.names, found.alpha, found.image_boxes, found.boxes, found.scores, strict=True
    ):
        x, y, z, length, height, width, rotation = box
        numbers = (alpha, *corners, height, width, length, x, y, z, rotation, score)
        lines.append(f"{name} -1 -1 " + " ".join(f"{number:.4f}" for number in numbers))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
