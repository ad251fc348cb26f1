"""COCO evaluation with average recall, any number of detections a picture, and results to print."""

import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmengine.logging import MessageHub
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.visualization import Visualizer
from pycocotools.coco import COCO
from rich.console import RenderableType

from polyfocal.calibration import DetectionCalibration, DetectionResult
from polyfocal.calibration.diagram import DIAGRAMS, pixels
from polyfocal.coco import CocoResult, evaluate, format_table
from polyfocal.errors import UserError
from polyfocal.registry import METRICS


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """MMDetection's ``CocoMetric``, measured by :func:`polyfocal.coco.evaluate`.

    The keys are MMDetection's (``bbox_mAP``, ``bbox_mAP_50``, ..., -1 where there is no ground
    truth) and average recall (``bbox_AR@1``, ..., ``bbox_AR_l``). After an evaluation
    ``coco_results`` holds everything by kind, the mAP of each class too.

    Args:
        ann_file: Annotation file of the split; None takes the ground truth from the data samples.
        metric: ``"bbox"``, ``"segm"`` or a list of them.
        classwise: Add the mAP of each class to the returned numbers, as ``bbox_{class}_precision``.
        max_dets: Most detections of a category in a picture that count.
        format_only: Write the detections to ``outfile_prefix`` without evaluating them.
        outfile_prefix: Where to write the detections, as ``{prefix}.bbox.json`` and
            ``{prefix}.segm.json``, compact and with six digits a number; None keeps no file.
        backend_args: How to reach ``ann_file`` where it is not on a disk.
        collect_device: Where several processes gather their results.
        prefix: In front of the keys; ``"coco"`` where it is None.
    """

    def __init__(
        self,
        ann_file: str | None = None,
        metric: str | list[str] = "bbox",
        classwise: bool = False,
        max_dets: int = 100,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict[str, Any] | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(
            ann_file=ann_file,
            metric=metric,
            classwise=classwise,
            format_only=format_only,
            outfile_prefix=outfile_prefix,
            backend_args=backend_args,
            collect_device=collect_device,
            prefix=prefix,
        )
        self.max_dets = max_dets
        self.coco_results: dict[str, CocoResult] = {}

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """Write the detections of all pictures as COCO results and evaluate them."""
        ground_truth, detections = zip(*results, strict=True)
        with tempfile.TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "results")
            coco = self._coco_api or self.gt_to_coco_json(ground_truth, prefix)
            classes = self.dataset_meta["classes"]
            self.cat_ids = (
                self._coco_api.get_cat_ids(cat_names=classes)
                if self._coco_api
                else range(len(classes))
            )
            files = self.results2json(detections, prefix)
            if self.outfile_prefix is not None:
                for kind in files.keys() & {"bbox", "segm"}:
                    _keep(Path(files[kind]), Path(f"{self.outfile_prefix}.{kind}.json"))
            if self.format_only:
                return {}
            metrics: dict[str, float] = {}
            for kind in self.metrics:
                if kind not in files:
                    raise UserError(
                        f"the model predicts no masks, so {kind!r} cannot be evaluated."
                    )
                result = self.measure(coco, files[kind], kind)
                self.coco_results[kind] = result
                metrics.update({f"{kind}_{name}": value for name, value in result.stats.items()})
                if self.classwise:
                    for name, value in result.per_class.items():
                        metrics[f"{kind}_{name}_precision"] = value
        return {name: -1.0 if math.isnan(value) else value for name, value in metrics.items()}

    def table(self) -> RenderableType | None:
        """What was measured last, for a terminal; None where nothing was."""
        return format_table(self.coco_results) if self.coco_results else None

    def measure(self, coco: COCO, file: str, kind: Literal["bbox", "segm"]) -> CocoResult:
        """The numbers of one kind.

        Args:
            coco: The ground truth.
            file: The detections, in COCO's results format.
            kind: What to compare.
        """
        return evaluate(coco, file, kind, self.max_dets, list(self.cat_ids))


@METRICS.register_module()
@MMENGINE_METRICS.register_module()
class CalibrationMetric(CocoMetric):
    """``CocoMetric`` with the calibration of the scores beside average precision.

    Adds ``bbox_D-ECE``, ``bbox_D-ECE_box``, ``bbox_LaECE``, ``bbox_LaECE_0``, ``bbox_LaACE_0``,
    ``bbox_LRP`` and ``bbox_oLRP`` (-1 where there is nothing to measure), see
    :class:`polyfocal.calibration.DetectionResult`, and likewise for ``segm``. After an evaluation
    ``calibration`` holds everything by kind. Reliability diagrams go where the run's visualizer
    puts its pictures, which is ``vis_data/vis_image`` in the work directory and TensorBoard, where
    the config has it.

    Args:
        iou: IoU from which on a detection is right for D-ECE and LRP.
        **kwargs: Those of :class:`CocoMetric`.

    Example:
        >>> val_evaluator = dict(type="polyfocal.CalibrationMetric")  # over a config's own
    """

    def __init__(self, *, iou: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iou = iou
        self.calibration: dict[str, DetectionResult] = {}

    def measure(self, coco: COCO, file: str, kind: Literal["bbox", "segm"]) -> CocoResult:
        """Average precision and recall, and calibration."""
        result = super().measure(coco, file, kind)
        metric = DetectionCalibration(self.iou)
        metric.update(coco, file, kind, self.max_dets, list(self.cat_ids))
        calibration = metric.compute()
        self.calibration[kind] = calibration
        self._draw(kind, calibration)
        return replace(result, stats={**result.stats, **calibration.stats})

    @staticmethod
    def _draw(kind: str, calibration: DetectionResult) -> None:
        visualizer = Visualizer.get_current_instance()
        step = MessageHub.get_current_instance().get_info("iter", 0)
        for name, draw in DIAGRAMS.items():
            visualizer.add_image(f"{kind}_{name}", pixels(draw(calibration)), step)


def _keep(file: Path, place: Path) -> None:
    """Move a JSON file of detections to its place, smaller, complete or not at all."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for detection in content:
        # Single precision written as double: two thirds of the digits mean nothing.
        detection["bbox"] = [float(f"{value:.6g}") for value in detection["bbox"]]
        detection["score"] = float(f"{detection['score']:.6g}")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.tmp")
    temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    os.replace(temporary, place)
