"""COCO evaluation with average recall, any limit of detections per picture, and tables to print."""

import contextlib
import copy
import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmengine.config import Config
from mmengine.fileio import get_local_path
from mmengine.hooks import EarlyStoppingHook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.visualization import Visualizer
from pycocotools.coco import COCO
from rich.console import Group, RenderableType

from polyfocal.calibration import DetectionResult, match
from polyfocal.calibration.detection import measure
from polyfocal.calibration.diagram import DIAGRAMS, pixels
from polyfocal.calibration.thresholds import Point, Thresholds, mean_point, points, points_table
from polyfocal.coco import CocoResult, evaluate, format_table
from polyfocal.data.detections import Kind
from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.mmdet.datasets import load_coco
from polyfocal.mmengine.configs import is_a
from polyfocal.mmengine.registry import METRICS

_USUAL = [100, 300, 1000]  # MMDetection's own proposal_nums; AP takes the first of them
_NO_TRUTH = (
    "CocoMetric has no ann_file and the samples bring no ground truth: give it one, or add "
    "'instances' to the meta_keys of PackDetInputs in the evaluation's pipeline."
)


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """MMDetection's ``CocoMetric``, measured by :func:`polyfocal.coco.evaluate`.

    The keys are MMDetection's (``bbox_mAP``, ``bbox_mAP_50``, ..., -1 without ground truth) and
    average recall (``bbox_AR@1``, ..., ``bbox_AR_l``). After an evaluation ``coco_results`` holds
    everything by kind, the mAP of each class too.

    Args:
        ann_file: Annotation file of the split; None takes the ground truth from the data samples,
            whose ``PackDetInputs`` must have ``"instances"`` among its ``meta_keys``.
        metric: ``"bbox"``, ``"segm"`` or a list of them.
        classwise: Add the mAP of each class to the returned numbers, as ``bbox_{class}_precision``.
        max_dets: Most detections of a category in a picture that count, everywhere but in AR@1 and
            AR@10.
        proposal_nums: MMDetection's setting; only values that mean 100 detections are accepted.
        format_only: Write the detections to ``outfile_prefix`` without evaluating them.
        outfile_prefix: Where to write the detections, as ``{prefix}.bbox.json`` and
            ``{prefix}.segm.json``, compact and with six digits per number; None keeps no file.
        backend_args: How to reach ``ann_file`` if it is not on a disk.
        collect_device: Where several processes gather their results.
        prefix: In front of the keys; None for ``"coco"``.
        thresholds: What ``tools/calibration.py --thresholds`` wrote: adds ``bbox_precision``,
            ``bbox_recall`` and ``bbox_F1`` at the score thresholds of the classes, the mean over
            the classes that have objects. Average precision stays that of all detections.
    """

    def __init__(
        self,
        ann_file: str | None = None,
        metric: str | list[str] = "bbox",
        classwise: bool = False,
        max_dets: int = 100,
        proposal_nums: Sequence[int] | None = None,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict[str, Any] | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
        thresholds: str | None = None,
    ) -> None:
        super().__init__(
            ann_file=ann_file if format_only else None,
            metric=metric,
            classwise=classwise,
            format_only=format_only,
            outfile_prefix=outfile_prefix,
            backend_args=backend_args,
            collect_device=collect_device,
            prefix=prefix,
        )
        if ann_file is not None and not format_only:  # a file to predict for may hold no objects
            with get_local_path(ann_file, backend_args=backend_args) as file:
                self._coco_api = load_coco(file)
        if proposal_nums and sorted(proposal_nums) not in (_USUAL, [1, 10, 100]):
            raise UserError(
                f"CocoMetric has proposal_nums={proposal_nums}: write max_dets={max(proposal_nums)}"
                " for the most detections of a picture, or take type='mmdet.CocoMetric'."
            )
        self.max_dets = max_dets
        self.coco_results: dict[str, CocoResult] = {}
        self.thresholds = None if thresholds is None else Thresholds.load(thresholds)
        self.points: dict[str, dict[str, Point]] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep what is predicted for a batch, and the ground truth if there is no file of it.

        Raises:
            UserError: The samples bring no ground truth either.
        """
        if self._coco_api is None and any("instances" not in one for one in data_samples):
            raise UserError(_NO_TRUTH)
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """Write the detections of all pictures as COCO results and evaluate them."""
        ground_truth, predictions = zip(*results, strict=True)
        coco = self._coco_api or self._from_samples(ground_truth)
        classes = self.dataset_meta["classes"]
        self.cat_ids = (
            self._coco_api.get_cat_ids(cat_names=classes) if self._coco_api else range(len(classes))
        )
        found = self._detections(predictions)
        if self.outfile_prefix is not None:
            for kind, detections in found.items():
                _keep(detections, f"{self.outfile_prefix}.{kind}.json")
        if self.format_only:
            return {}
        metrics: dict[str, float] = {}
        for kind in self.metrics:
            if kind not in found:
                raise UserError(f"the model predicts no masks, so {kind!r} cannot be evaluated.")
            result = self._measured(coco, found[kind], kind)
            self.coco_results[kind] = result
            metrics.update(self._named(kind, result))
        return {name: -1.0 if math.isnan(value) else value for name, value in metrics.items()}

    def table(self) -> RenderableType | None:
        """What was measured last, for a terminal; None where nothing was."""
        if not self.coco_results:
            return None
        iou = self.thresholds.iou if self.thresholds else 0.0
        tables = [points_table(found, iou) for found in self.points.values()]
        return Group(format_table(self.coco_results), *tables)

    def names(self, classes: Sequence[str]) -> list[str]:
        """The names of the numbers that an evaluation gives, known before there is one."""
        if self.format_only:
            return []
        probe, nothing = copy.copy(self), COCO()
        nothing.dataset = {
            "images": [],
            "annotations": [],
            "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            nothing.createIndex()
        probe.cat_ids = list(range(len(classes)))
        return [
            f"{self.prefix}/{name}"
            for kind in self.metrics
            for name in self._named(kind, probe._measured(nothing, [], kind))
        ]

    def measure(self, coco: COCO, found: list[dict[str, Any]], kind: Kind) -> CocoResult:
        """The numbers of one kind.

        Args:
            coco: The ground truth.
            found: The detections in COCO's results format.
            kind: What to compare.
        """
        return evaluate(coco, found, kind, self.max_dets, list(self.cat_ids))

    def _measured(self, coco: COCO, found: Any, kind: Kind) -> CocoResult:
        """:meth:`measure`, and what the thresholds do where there are some."""
        result = self.measure(coco, found, kind)
        if self.thresholds is None:
            return result
        ids = list(self.cat_ids)
        matched = match(coco, found, [self.thresholds.iou], kind, self.max_dets, ids)
        at = points(matched, self.thresholds)
        self.points = {**self.points, kind: at}
        return replace(result, stats={**result.stats, **mean_point(at)})

    def _named(self, kind: str, result: CocoResult) -> dict[str, float]:
        named = {f"{kind}_{name}": value for name, value in result.stats.items()}
        if self.classwise:
            for name, value in result.per_class.items():
                named[f"{kind}_{name}_precision"] = value
        return named

    def _detections(self, predictions: Sequence[dict]) -> dict[str, list[dict[str, Any]]]:
        """The detections of all pictures in COCO's results format, by kind."""
        found: dict[str, list[dict[str, Any]]] = {"bbox": []}
        if "masks" in predictions[0]:
            found["segm"] = []
        for one in predictions:
            of_kind = {"bbox": one["scores"], "segm": one.get("mask_scores", one["scores"])}
            for row, label in enumerate(one["labels"]):
                box = self.xyxy2xywh(one["bboxes"][row])
                where = {"image_id": one["img_id"], "category_id": self.cat_ids[label], "bbox": box}
                for kind, detections in found.items():
                    detections.append({**where, "score": float(of_kind[kind][row])})
                if "segm" in found:
                    rle = dict(one["masks"][row])
                    if isinstance(rle["counts"], bytes):
                        rle["counts"] = rle["counts"].decode()
                    found["segm"][-1]["segmentation"] = rle
        return found

    def _from_samples(self, ground_truth: Sequence[dict]) -> COCO:
        """The ground truth that came with the samples, as MMDetection makes COCO's format of it."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(self.gt_to_coco_json(ground_truth, f"{folder}/truth"))
        coco.dataset.setdefault("annotations", [])
        return coco


@METRICS.register_module()
@MMENGINE_METRICS.register_module()
class CalibrationMetric(CocoMetric):
    """``CocoMetric`` with the calibration of the scores beside average precision.

    Adds ``bbox_D-ECE``, ``bbox_D-ECE_box``, ``bbox_LaECE``, ``bbox_LaECE_0``, ``bbox_LaACE_0``,
    ``bbox_LRP`` and ``bbox_oLRP`` (-1 if there is nothing to measure), see
    :class:`polyfocal.calibration.DetectionResult`, and the same for ``segm``. After an evaluation
    ``calibration`` holds everything by kind. In a run, reliability diagrams go where its visualizer
    puts its pictures: ``vis_data/vis_image`` in the work directory, and TensorBoard if the config
    has it.

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

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """Evaluate the detections of all pictures, and draw their reliability."""
        metrics = super().compute_metrics(results)
        for kind, calibration in self.calibration.items():
            self._draw(kind, calibration)
        return metrics

    def measure(self, coco: COCO, found: list[dict[str, Any]], kind: Kind) -> CocoResult:
        """Average precision and recall, and calibration."""
        categories = list(self.cat_ids)
        result, found_out = measure(coco, found, kind, self.max_dets, categories, iou=self.iou)
        self.calibration = {**self.calibration, kind: found_out}
        return result

    @staticmethod
    def _draw(kind: str, calibration: DetectionResult) -> None:
        try:
            visualizer = Visualizer.get_current_instance()
        except RuntimeError:  # there is none outside of a run
            return
        step = MessageHub.get_current_instance().get_info("iter", 0)
        for name, draw in DIAGRAMS.items():
            visualizer.add_image(f"{kind}_{name}", pixels(draw(calibration)), step)


def check_ground_truth(metrics: Sequence[Any], dataset: Any) -> None:
    """Check that metrics without an annotation file get the ground truth with the samples.

    Raises:
        UserError: They do not. MMDetection would fail after the first epoch.
    """
    if any(isinstance(one, MMDetCocoMetric) and one._coco_api is None for one in metrics):
        sample = dataset[0]["data_samples"]
        if "instances" not in sample:
            raise UserError(_NO_TRUTH)


def number_from_one(coco: COCO) -> None:
    """Give annotations other ids if one is 0, which means "no match" for pycocotools.

    Args:
        coco: The ground truth of MMDetection's own metric; that of this package numbers by itself.
    """
    if 0 in coco.anns:
        for number, annotation in enumerate(coco.anns.values(), start=1):
            annotation["id"] = number
        coco.anns = {annotation["id"]: annotation for annotation in coco.anns.values()}


def check_names(cfg: Config, metrics: Sequence[Any], classes: Sequence[str]) -> None:
    """Check that the numbers that hooks wait for will be measured.

    Raises:
        UserError: One will not. MMEngine would fail after the first epoch.
    """
    if not metrics or not all(isinstance(metric, CocoMetric) for metric in metrics):
        return  # what other metrics measure is known only afterwards
    measured = [name for metric in metrics for name in metric.names(classes)]
    best = cfg.default_hooks.get("checkpoint", {}).get("save_best")
    wanted = [("save_best", name) for name in ([best] if isinstance(best, str) else best or [])]
    for hook in cfg.get("custom_hooks") or []:
        if is_a(hook, HOOKS, cfg.get("default_scope"), EarlyStoppingHook):
            wanted.append(("monitor", hook.get("monitor")))
    for setting, name in wanted:
        if name not in ("auto", "loss") and name not in measured:
            raise UserError(
                f"{setting}={name!r} of {cfg.filename} is not measured: expected one of "
                f"{', '.join(sorted(measured))}."
            )


def _keep(detections: list[dict[str, Any]], file: str) -> None:
    """Write detections, compact, complete or not at all."""

    def shorter(one: dict[str, Any]) -> dict[str, Any]:
        # Single precision written as double: two thirds of the digits mean nothing.
        box = [float(f"{value:.6g}") for value in one["bbox"]]
        return {**one, "bbox": box, "score": float(f"{one['score']:.6g}")}

    write_text(file, json.dumps([shorter(one) for one in detections], separators=(",", ":")))
