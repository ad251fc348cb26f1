"""Finished trainings side by side: numbers, settings, curves and pictures."""

import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from polyfocal.calibration import DetectionCalibration, DetectionResult, match
from polyfocal.calibration.detection import LAECE_IOU, MatchedDetections
from polyfocal.data.annotations import Annotations
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import CocoResult, evaluate
from polyfocal.errors import UserError
from polyfocal.experiments.report import COLORS, Heading, Part, Picture, Table, page
from polyfocal.experiments.study import flat
from polyfocal.experiments.trained import TrainedRun

KINDS = {"bbox": "boxes", "segm": "masks"}
IOU = 0.5
"""From this IoU on a detection is right, in the pictures and for calibration."""

_STROKES = ("solid", "dashed", "dotted", "dashdot")
_LOWER_IS_BETTER = re.compile(
    # A whole name behind the split or the kind; a class of such a name has more behind it. The last
    # two are of nuScenes.
    r"(^|[ _/])(D-ECE(_box)?|La[EA]CE(_0)?|[EA]CE|o?LRP|NLL|Brier|loss|\w+_err|mA[TSOVA]E)$",
    re.IGNORECASE,
)
# Settings of a config that differ from run to run, whatever is compared.
_NOT_A_SETTING = re.compile(
    r"^(work_dir|experiment_name|load_from|resume|launcher|visualizer)(\.|$)|\.(ann_file|img)$"
)


@dataclass(frozen=True)
class MeasuredDetections:
    """What the kept detections of a run, boxes or masks, tell beyond its logged numbers.

    Attributes:
        coco: Average precision and recall, and the curves.
        calibration: The calibration of the scores.
        matches: Which detections are right.
        boxes: x, y, width, height in pixels of the detections in ``matches``, (N, 4).
        pictures: Ids of the pictures, (N,).
        threshold: The score threshold at which the detections have the highest F1.
    """

    coco: CocoResult
    calibration: DetectionResult
    matches: MatchedDetections
    boxes: NDArray[np.float64]
    pictures: NDArray[np.int64]
    threshold: float

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which detections found an object."""
        return self.matches.matches[IOU].right

    @property
    def shown(self) -> NDArray[np.bool_]:
        """The detections that a person would look at: from the threshold on, not in a crowd."""
        return (self.matches.score >= self.threshold) & ~self.matches.matches[IOU].ignored


@dataclass
class Comparison:
    """Runs by their names, and their detections by kind.

    Attributes:
        runs: In the order in which they were given.
        truth: The ground truth, if there are detections.
        detections: By kind, then by the run's name.
        notes: What a reader must know.
    """

    runs: dict[str, TrainedRun]
    truth: Annotations | None = None
    detections: dict[str, dict[str, MeasuredDetections]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        return list(self.runs)

    def style(self, name: str) -> dict[str, Any]:
        """How a run's line is drawn, the same in every figure."""
        number = self.names.index(name)
        stroke = _STROKES[number // len(COLORS) % len(_STROKES)]
        return {"color": COLORS[number % len(COLORS)], "linestyle": stroke, "label": name}


def compare(work_dirs: Sequence[str | Path], read: Callable[[Path], TrainedRun]) -> Comparison:
    """Read the work directories, and measure what their detections say.

    Args:
        work_dirs: Two or more.
        read: Reads one, such as :func:`polyfocal.mmengine.work_dir.read_trained_run`.

    Raises:
        UserError: One is no finished training, or they were not evaluated on the same data.
    """
    folders = dict.fromkeys(Path(os.path.abspath(folder)) for folder in work_dirs)
    if len(folders) < 2:
        raise UserError("a comparison takes two work directories or more, got one.")
    first, *others = runs = [read(folder) for folder in folders]
    for run in others:
        if not first.evaluated_as(run):
            raise UserError(
                f"{first.folder} and {run.folder} were evaluated on different data "
                f"({first.data} and {run.data}): compare runs on the same data."
            )
    common = os.path.commonpath([run.folder for run in runs])
    comparison = Comparison({run.folder.relative_to(common).as_posix(): run for run in runs})
    if first.annotation_file is not None:
        _add_detections(comparison)
    return comparison


def _add_detections(comparison: Comparison) -> None:
    runs = comparison.runs
    for name, run in runs.items():
        if not run.results:
            comparison.notes.append(
                f"{name} keeps no detections, so parts of this report are without it; "
                f"polyfocal test CONFIG CHECKPOINT --out {run.folder}/val.json writes them."
            )
    if len(comparison.notes) == len(runs):
        return
    files = [run.annotation_file for run in runs.values()]
    file = next((one for one in files if one is not None and one.is_file()), None)
    if file is None:
        comparison.notes.append(
            f"{next(iter(runs.values())).data} is not there any more, so nothing could be measured "
            "from the detections."
        )
        return
    comparison.truth = next(iter(runs.values())).truth(file)
    for name, run in runs.items():
        for kind, results in run.results.items():
            found = _measure(run, comparison.truth, results, kind)
            comparison.detections.setdefault(kind, {})[name] = found
            logged = run.measured.get(f"{kind}_mAP", math.nan)
            if abs(logged - found.coco.stats["mAP"]) > 1e-3:
                comparison.notes.append(
                    f"{results} has {kind} mAP {found.coco.stats['mAP']:.3f} and the last "
                    f"evaluation {logged:.3f}: these are not its detections."
                )


def _measure(run: TrainedRun, truth: Annotations, file: Path, kind: Kind) -> MeasuredDetections:
    results = Detections.of(file)
    matches = match(truth, results, [0.0, LAECE_IOU, IOU], kind, run.max_dets)
    calibration = DetectionCalibration(IOU)
    calibration.add(matches)
    kept = [results.entries[row] for row in matches.index]
    if kind == "bbox":
        boxes = [one["bbox"] for one in kept]
    else:
        boxes = coco_mask.toBbox([one["segmentation"] for one in kept]) if kept else []
    at_iou = matches.matches[IOU]
    return MeasuredDetections(
        coco=evaluate(truth, results, kind, run.max_dets),
        calibration=calibration.compute(),
        matches=matches,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        pictures=np.array([one["image_id"] for one in kept], dtype=np.int64),
        threshold=best_threshold(
            matches.score[~at_iou.ignored],
            at_iou.right[~at_iou.ignored],
            int(matches.num_objects.sum()),
        ),
    )


def best_threshold(score: NDArray[np.float64], right: NDArray[np.bool_], num_objects: int) -> float:
    """The score from which on F1 = 2 TP / (detections + objects) is highest; 1 for none."""
    if not right.any():
        return 1.0
    order = np.argsort(-score, kind="stable")
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + num_objects)
    # A threshold takes all detections of one score, or none of them.
    last = np.append(np.diff(score[order]) != 0, True)
    return float(score[order][last][np.argmax(f1[last])])


def differing_settings(runs: Mapping[str, TrainedRun]) -> dict[str, list[str]]:
    """Settings of the configs that differ between the runs, with the value of each run."""
    every = [dict(flat(run.config)) for run in runs.values()]
    table = {key: [one.get(key, "") for one in every] for key in itertools.chain(*every)}
    return {
        key: values
        for key, values in table.items()
        if len(set(values)) > 1 and not _NOT_A_SETTING.search(key)
    }


def result_rows(comparison: Comparison) -> dict[str, list[float]]:
    """The numbers of every run's last evaluation, by their names; NaN for a missing number."""
    measured = []
    for name, run in comparison.runs.items():
        numbers = {key: math.nan if v == -1 else v for key, v in run.measured.items()}
        for kind, found in comparison.detections.items():
            if name in found:
                for key, value in found[name].calibration.stats.items():
                    numbers.setdefault(f"{kind}_{key}", value)
        measured.append(numbers)
    keys = dict.fromkeys(key for numbers in measured for key in numbers)
    return {key: [numbers.get(key, math.nan) for numbers in measured] for key in keys}


def class_rows(
    found: dict[str, MeasuredDetections], names: Sequence[str]
) -> dict[str, list[float]]:
    """Average precision of each class in every run."""
    classes = next(iter(found.values())).coco.per_class
    nan = dict.fromkeys(classes, math.nan)
    per_run = [found[name].coco.per_class if name in found else nan for name in names]
    return {one: [numbers[one] for numbers in per_run] for one in classes}


def cost_rows(runs: dict[str, TrainedRun]) -> dict[str, list[str]]:
    """How long each run trained, at which cost, and from which seed."""
    rows: dict[str, list[str]] = {}
    for run in runs.values():
        times = [record["time"] for record in run.training if "time" in record]
        memory = [record["memory"] for record in run.training if "memory" in record]
        seed = (run.config.get("randomness") or {}).get("seed")
        cells = {
            "epochs": str(run.config["train_cfg"].get("max_epochs") or ""),
            "last logged iteration": f"{run.training[-1]['iter']:g}",
            "seconds per iteration, median": f"{median(times):.3f}" if times else "",
            "most memory, MiB": f"{max(memory):.0f}" if memory else "",
            "seed": "" if seed is None else str(seed),
        }
        for key, cell in cells.items():
            rows.setdefault(key, []).append(cell)
    return {key: cells for key, cells in rows.items() if any(cells)}


def draw_training(comparison: Comparison) -> Figure:
    """The losses over the iterations, and the first number of the evaluations over the epochs."""
    runs = comparison.runs
    logged = [key for run in runs.values() for record in run.training for key in record]
    losses = [key for key in dict.fromkeys(logged) if key.startswith("loss")]
    losses = sorted(losses, key=lambda key: key != "loss")[:4]
    figure, axes = _axes(len(losses) + 1)
    for axis, key in zip(axes, losses, strict=False):
        for name, run in runs.items():
            points = [(r["iter"], r[key]) for r in run.training if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), lw=1.2, **comparison.style(name))
        axis.set(title=key, xlabel="iteration", yscale="log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    shown = next(iter(next(iter(runs.values())).measured), None)
    for name, run in runs.items():
        points = [(e["step"], e[shown]) for e in run.evaluations if shown in e]
        if points:
            axes[-1].plot(*zip(*points, strict=True), marker="o", ms=4, **comparison.style(name))
    by_epoch = next(iter(runs.values())).config["train_cfg"].get("max_epochs")
    axes[-1].set(title=_shown(shown or ""), xlabel="epoch" if by_epoch else "iteration")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _legend(figure, axes)


def draw_precision(comparison: Comparison, found: dict[str, MeasuredDetections]) -> Figure:
    """Precision against recall, the mean over the classes."""
    figure, axes = _axes(2)
    for axis, (row, iou) in zip(axes, ((0, 0.5), (5, 0.75)), strict=True):
        for name, one in found.items():
            axis.plot(np.linspace(0, 1, 101), one.coco.precision[row], **comparison.style(name))
        axis.set(title=f"IoU {iou}", xlabel="recall", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("precision")
    return _legend(figure, axes)


def draw_calibration(comparison: Comparison, found: dict[str, MeasuredDetections]) -> Figure:
    """Precision against score, equal for calibrated scores; and the number of detections."""
    figure, axes = _axes(2)
    for name, one in found.items():
        bins = one.calibration.bins
        some = bins.count > 0
        style = comparison.style(name)
        axes[0].plot(bins.confidence[some], bins.target[some], marker="o", ms=3, **style)
        middle = (bins.edges[:-1] + bins.edges[1:]) / 2
        axes[1].plot(middle, np.maximum(bins.count, 0.5), drawstyle="steps-mid", **style)
    axes[0].plot([0, 1], [0, 1], color="black", lw=0.8, linestyle="dotted")
    axes[0].set(title="precision", xlabel="score", xlim=(0, 1), ylim=(0, 1))
    axes[1].set(title="detections", xlabel="score", xlim=(0, 1), yscale="log")
    return _legend(figure, axes)


@dataclass(frozen=True)
class DifferingPicture:
    """A picture on which the runs differ: its id and file, and the F1 of each run."""

    id: int
    file: Path
    f1: dict[str, float]

    @property
    def difference(self) -> float:
        """The difference in F1 between the best and the worst run."""
        return max(self.f1.values()) - min(self.f1.values())


def differing_pictures(
    truth: Annotations, image_dir: Path, found: dict[str, MeasuredDetections], number: int
) -> list[DifferingPicture]:
    """The pictures with the largest difference in F1 at each run's own best threshold.

    Args:
        truth: The ground truth.
        image_dir: Folder of the pictures.
        found: By the runs' names.
        number: Most pictures to return; those on which the runs agree are left out.
    """
    ids = np.array([image["id"] for image in truth.images])
    order = np.argsort(ids)

    def count(pictures: Any) -> NDArray[np.int64]:
        rows = order[np.searchsorted(ids[order], np.asarray(pictures, dtype=np.int64))]
        return np.bincount(rows, minlength=len(ids))

    num_objects = count([one["image_id"] for one in truth.objects])
    f1 = {}
    for name, one in found.items():
        shown = one.shown
        right = count(one.pictures[shown & one.right])
        both = count(one.pictures[shown]) + num_objects
        f1[name] = np.where(both > 0, 2 * right / np.maximum(both, 1), 1.0)
    pictures = [
        DifferingPicture(
            image["id"],
            image_dir / image["file_name"],
            {name: float(values[row]) for name, values in f1.items()},
        )
        for row, image in enumerate(truth.images)
    ]
    pictures = [one for one in pictures if one.difference > 0]
    return sorted(pictures, key=lambda one: (-one.difference, one.id))[:number]


def draw_picture(
    picture: DifferingPicture, truth: Annotations, found: dict[str, MeasuredDetections]
) -> Figure:
    """The ground truth, then the detections of each run: right ones green, wrong ones orange."""
    image = np.asarray(Image.open(picture.file).convert("RGB"))
    objects = [one for one in truth.objects if one["image_id"] == picture.id]
    columns = min(3, len(found) + 1)
    rows = -(-(len(found) + 1) // columns)
    height = 4.0 * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(4.0 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(image)
    axes[0].set_title(f"{len(objects)} objects", fontsize=8)
    _boxes(axes[0], [one["bbox"] for one in objects], "#0072B2")
    for axis, (name, one) in zip(axes[1:], found.items(), strict=False):
        here = one.shown & (one.pictures == picture.id)
        right = one.right
        axis.imshow(image)
        axis.set_title(
            f"{name}: {(here & right).sum()} right, {(here & ~right).sum()} wrong, "
            f"F1 {picture.f1[name]:.2f}",
            fontsize=8,
            parse_math=False,
        )
        _boxes(axis, one.boxes[here & ~right], "#E69F00")
        _boxes(axis, one.boxes[here & right], "#00C853")
    return figure


def _boxes(axis: Axes, boxes: Iterable[Any], color: str) -> None:
    for x, y, width, height in boxes:
        axis.add_patch(Rectangle((x, y), width, height, fill=False, lw=1.2, ec=color))


def _axes(number: int) -> tuple[Figure, list[Axes]]:
    columns = 2 if number == 4 else min(3, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.axis("off")
    for axis in axes[:number]:
        axis.grid(alpha=0.3)
    return figure, axes[:number]


def _legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=8,
    )
    return figure


def report(comparison: Comparison, num_pictures: int) -> str:
    """The whole report, one page of HTML that loads nothing else."""
    sections: dict[str, list[Part]] = {}

    def add(title: str, *parts: Part) -> None:
        sections.setdefault(title, []).extend(parts)

    names = comparison.names
    add(
        "Results",
        "The last evaluation of every run; the best of a row is marked. Two single runs differ "
        "by chance too: polyfocal reproduce compares over seeds.",
        results_table(comparison),
    )
    add("Cost", text_table(names, cost_rows(comparison.runs)))
    settings = differing_settings(comparison.runs)
    add(
        "Settings that differ",
        text_table(names, settings, "text") if settings else "None but the folders.",
    )
    add(
        "Training",
        "Values of different losses cannot be compared with each other; the shapes of their "
        "curves can.",
        Picture.of(draw_training(comparison), "losses and evaluations over the training"),
    )
    for kind, found in comparison.detections.items():
        what = KINDS[kind]
        rows = class_rows(found, names)
        add("Average precision by class", Heading(what), number_table(names, rows))
        add(
            "Precision and recall",
            Heading(what),
            "Mean over the classes.",
            Picture.of(draw_precision(comparison, found), f"precision against recall of {what}"),
        )
        add(
            "Calibration",
            Heading(what),
            f"How many of the detections of a score are right, at IoU {IOU}. On the dotted line "
            "the score is the probability.",
            Picture.of(draw_calibration(comparison, found), f"reliability of {what}"),
        )
    if comparison.detections and num_pictures > 0:
        add("Pictures", *_pictures(comparison, num_pictures))
    return page(f"Comparison of {len(names)} runs", sections, comparison.notes)


def _pictures(comparison: Comparison, number: int) -> list[Part]:
    found = comparison.detections.get("bbox") or comparison.detections["segm"]
    if len(found) < 2:
        return ["Only one run keeps its detections."]
    truth = comparison.truth
    assert truth is not None
    image_dir = comparison.runs[next(iter(found))].image_dir
    pictures = differing_pictures(truth, image_dir, found, number)
    thresholds = ", ".join(f"{name} {one.threshold:.2f}" for name, one in found.items())
    parts: list[Part] = [
        "Those with the largest difference in F1 between the best and the worst run. Every run "
        "is shown from its own best score on, since losses differ in how sure they make a model: "
        f"{thresholds}. Blue: the objects; green: right, with IoU {IOU} or more; orange: wrong."
    ]
    if not pictures:
        parts.append("The runs agree on all pictures.")
    for picture in pictures:
        if not picture.file.is_file():
            parts.append(f"{picture.file} is not there any more.")
            continue
        name = picture.file.name
        parts.append(Heading(f"{name}, difference {picture.difference:.2f}"))
        parts.append(Picture.of(draw_picture(picture, truth, found), name, "jpeg"))
    return parts


def results_table(comparison: Comparison) -> Table:
    """The numbers of every run's last evaluation."""
    rows = {_shown(key): values for key, values in result_rows(comparison).items()}
    low = {key for key in rows if _LOWER_IS_BETTER.search(key)}
    return number_table(comparison.names, rows, low)


def number_table(
    names: Sequence[str], rows: Mapping[str, list[float]], lower_is_better: Collection[str] = ()
) -> Table:
    """Numbers with the best of each row marked: the highest, or the lowest in the named rows."""
    best = set()
    for place, (key, values) in enumerate(rows.items()):
        known = [value for value in values if not math.isnan(value)]
        if len(set(known)) > 1:
            target = (min if key in lower_is_better else max)(known)
            best |= {(place, column) for column, v in enumerate(values, 1) if v == target}
    cells = [[key, *map(_number, values)] for key, values in rows.items()]
    return Table(("", *names), cells, best=best)


def text_table(names: Sequence[str], rows: Mapping[str, list[str]], style: str = "") -> Table:
    """Texts as they are."""
    return Table(("", *names), [[key, *cells] for key, cells in rows.items()], style=style)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def _shown(key: str) -> str:
    return key.replace("bbox_", "box ").replace("segm_", "mask ")
