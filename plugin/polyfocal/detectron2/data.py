"""COCO-format folders in Detectron2's catalogs, and their evaluation."""

import codecs
import json
from collections import Counter, OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import (
    annotations_to_instances,
    filter_empty_instances,
    read_image,
    transform_instance_annotations,
)
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from numpy.typing import NDArray
from PIL import Image

from polyfocal.calibration import DetectionResult
from polyfocal.calibration.detection import measure
from polyfocal.calibration.diagram import save_diagrams
from polyfocal.coco import CocoResult, CocoSplit, evaluate
from polyfocal.data.annotations import read_annotations
from polyfocal.data.detections import Kind
from polyfocal.data.pictures import PictureError
from polyfocal.errors import UserError

_BOX = ("bbox", "bbox_mode", "category_id")


def register_split(split: CocoSplit) -> str:
    """Register a checked split with Detectron2; it replaces an earlier one of the same file.

    Returns:
        The name in DatasetCatalog and MetadataCatalog: the path of the annotation file.
    """
    name = str(split.annotation_file.resolve())
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    image_dir = str(split.image_dir.resolve())
    DatasetCatalog.register(name, lambda: _load(split, name, image_dir))
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=name, image_root=image_dir, evaluator_type="coco")
    return name


def _load(split: CocoSplit, name: str, image_dir: str) -> list[dict[str, Any]]:
    """What Detectron2 reads from a split; it would fail at a byte order mark and ``ignore: 1``."""
    content = split.annotations.content
    kept = [one for one in content["annotations"] if not one.get("ignore")]
    with open(name, "rb") as file:
        marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    if not marked and len(kept) == len(content["annotations"]):
        return load_coco_json(name, image_dir, name)
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "annotations.json"
        plain.write_text(json.dumps({**content, "annotations": kept}), encoding="utf-8")
        return load_coco_json(str(plain), image_dir, name)


def number_from_1(evaluator: DatasetEvaluator) -> None:
    """Number the objects anew for Detectron2's evaluator.

    There the id 0 means "no match", and its faster form takes no id below 0.
    """
    if isinstance(evaluator, DatasetEvaluators):
        for one in evaluator._evaluators:
            number_from_1(one)
    if isinstance(evaluator, COCOEvaluator) and min(evaluator._coco_api.anns, default=1) < 1:
        annotations = read_annotations(evaluator._metadata.json_file, pictures=False)
        evaluator._coco_api = annotations.coco()


def load_picture(path: Path) -> NDArray[np.uint8]:
    """What a training of Detectron2 makes of a picture file.

    Raises:
        PictureError: It would be white.
    """
    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise PictureError("Detectron2 makes every value above 255 white")
    return read_image(str(path), format="BGR")


def count_objects(name: str) -> tuple[int, Counter[str]]:
    """How many pictures and how many objects of each class Detectron2 trains on.

    Args:
        name: A COCO-format data set of Detectron2's catalogs.

    Returns:
        The pictures, and the objects by the name of their class, 0 for those without any.

    Raises:
        UserError: Detectron2 does not read the file, or it has no objects.
    """
    try:
        every = DatasetCatalog.get(name)
    except Exception as error:  # its assertions
        raise UserError(
            f"Detectron2 does not read {name}: {' '.join(str(error).split())}"
        ) from error
    classes = MetadataCatalog.get(name).thing_classes
    pictures = filter_images_with_only_crowd_annotations(every)
    counts = Counter(dict.fromkeys(classes, 0))
    for picture in pictures:
        # As the mapper of the training does, without loading the picture.
        size = picture["height"], picture["width"]
        objects = [
            transform_instance_annotations({key: one[key] for key in _BOX}, [], size)
            for one in picture["annotations"]
            if one.get("iscrowd", 0) == 0
        ]
        kept = filter_empty_instances(annotations_to_instances(objects, size))
        counts.update(classes[label] for label in kept.gt_classes.tolist())
    if not counts.total():
        raise UserError(
            f"there is nothing to train on in {name}: of its"
            f" {sum(len(picture['annotations']) for picture in every)} annotations every one is a"
            " crowd region or has no area inside its picture."
        )
    return len(pictures), counts


class CocoEvaluator(DatasetEvaluator):
    """Average precision and recall by :func:`polyfocal.coco.evaluate`, as pycocotools counts.

    :meth:`evaluate` returns the numbers as Detectron2's own evaluator does, by kind and in percent.
    Afterwards ``coco_results`` holds everything by kind, the mAP of each class too.

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
        kinds: tuple[Kind, ...] = ("bbox", "segm") if has_masks else ("bbox",)
        for kind in kinds:
            truth = Path(metadata.json_file)
            result = self.measure(truth, detections, kind)
            self.coco_results[kind] = result
            numbers[kind] = {
                name.replace("mAP_", "AP").replace("mAP", "AP"): 100 * value
                for name, value in result.stats.items()
            }
        return numbers

    def measure(self, truth: Path, detections: list[dict[str, Any]], kind: Kind) -> CocoResult:
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

    def measure(self, truth: Path, detections: list[dict[str, Any]], kind: Kind) -> CocoResult:
        """Average precision and recall, and calibration."""
        result, calibration = measure(truth, detections, kind, self.max_dets, iou=self.iou)
        self.calibration[kind] = calibration
        if self.output_dir is not None:
            save_diagrams(calibration, self.output_dir, f"{kind}_")
        return result
