"""COCO-format folders in Detectron2's catalogs, and their evaluation."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm

from polyfocal.calibration import DetectionCalibration, DetectionResult
from polyfocal.calibration.diagram import save_diagrams
from polyfocal.coco import CocoResult, CocoSplit, evaluate


def register_split(split: CocoSplit) -> str:
    """Register a checked split with Detectron2, in the place of an earlier one of the same file.

    Returns:
        Its name in DatasetCatalog and MetadataCatalog: the path of its annotation file.
    """
    name = str(split.annotation_file.resolve())
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, name, str(split.image_dir.resolve()))
    return name


class CocoEvaluator(DatasetEvaluator):
    """Average precision and recall by :func:`polyfocal.coco.evaluate`, which is pycocotools'.

    :meth:`evaluate` returns the numbers as Detectron2's own evaluator does, by kind and in percent;
    after it ``coco_results`` holds everything by kind, the mAP of each class too.

    Args:
        dataset_name: A COCO-format data set of Detectron2's catalogs.
        max_dets: Most detections of a category in a picture that count.
    """

    def __init__(self, dataset_name: str, max_dets: int = 100) -> None:
        self.dataset_name = dataset_name
        self.max_dets = max_dets
        self.coco_results: dict[str, CocoResult] = {}
        self._detections: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget the detections of an earlier evaluation."""
        self._detections = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the detections of a batch."""
        for picture, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self._detections += instances_to_coco_json(instances, picture["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The numbers of all pictures; empty except on the main process."""
        gathered = comm.gather(self._detections)
        if not comm.is_main_process():
            return {}
        metadata = MetadataCatalog.get(self.dataset_name)
        category_ids = {
            label: id_ for id_, label in metadata.thing_dataset_id_to_contiguous_id.items()
        }
        detections = [
            {**detection, "category_id": category_ids[detection["category_id"]]}
            for part in gathered
            for detection in part
        ]
        has_masks = any("segmentation" in detection for detection in detections)
        numbers: dict[str, dict[str, float]] = OrderedDict()
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if has_masks else ("bbox",)
        for kind in kinds:
            truth = Path(metadata.json_file)
            result = self.measure(truth, detections, kind)
            self.coco_results[kind] = result
            numbers[kind] = {
                name.replace("mAP_", "AP").replace("mAP", "AP"): 100 * value
                for name, value in result.stats.items()
            }
        return numbers

    def measure(
        self, truth: Path, detections: list[dict[str, Any]], kind: Literal["bbox", "segm"]
    ) -> CocoResult:
        """The numbers of one kind, from COCO's ground truth and results."""
        return evaluate(truth, detections, kind, self.max_dets)


class CalibrationEvaluator(CocoEvaluator):
    """``CocoEvaluator`` with the calibration of the scores beside average precision.

    Adds ``D-ECE``, ``D-ECE_box``, ``LaECE``, ``LaECE_0``, ``LaACE_0``, ``LRP`` and ``oLRP``, in
    percent too, see :class:`polyfocal.calibration.DetectionResult`. After an evaluation
    ``calibration`` holds everything by kind.

    Args:
        dataset_name: A COCO-format data set of Detectron2's catalogs.
        max_dets: Most detections of a category in a picture that count.
        iou: IoU from which on a detection is right for D-ECE and LRP.
        output_dir: Where reliability diagrams go, ``{kind}_reliability.png`` and
            ``{kind}_reliability_by_class.png``; None draws none.

    Example:
        >>> dataloader.evaluator = L(CalibrationEvaluator)(
        ...     dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}"
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset_name: str,
        max_dets: int = 100,
        iou: float = 0.5,
        output_dir: str | None = None,
    ) -> None:
        super().__init__(dataset_name, max_dets)
        self.iou = iou
        self.output_dir = output_dir
        self.calibration: dict[str, DetectionResult] = {}

    def measure(
        self, truth: Path, detections: list[dict[str, Any]], kind: Literal["bbox", "segm"]
    ) -> CocoResult:
        """Average precision and recall, and calibration."""
        result = super().measure(truth, detections, kind)
        metric = DetectionCalibration(self.iou)
        metric.update(truth, detections, kind, self.max_dets)
        calibration = metric.compute()
        self.calibration[kind] = calibration
        if self.output_dir is not None:
            save_diagrams(calibration, self.output_dir, f"{kind}_")
        return replace(result, stats={**result.stats, **calibration.stats})
