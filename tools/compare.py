"""Compare finished trainings of tools/train.py in one HTML file.

The report holds the numbers of the last evaluations, average precision by class, calibration, the
curves of training, precision against recall, time and memory, which settings differ, and the
pictures on which the runs differ most. It needs nothing beside itself: mail it, or open it from a
disk. All runs must have been evaluated on the same data.

What needs the detections is taken from WORK_DIR/val.bbox.json (and val.segm.json), which
tools/train.py leaves there; tools/test.py CONFIG CHECKPOINT --out WORK_DIR/val.json writes them for
a run that has none.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from polyfocal.calibration import DetectionCalibration, DetectionResult
from polyfocal.calibration.detection import MatchedDetections, match
from polyfocal.coco import CocoResult, evaluate, read_annotations
from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.mmdet.command_line import run_tool
from polyfocal.mmengine.work_dir import TrainedRun, read_trained_run

EXAMPLES = """\
examples:
  # two losses on the built-in pictures
  python tools/train.py configs/retinanet_focal.py --demo
  python tools/train.py configs/retinanet_poly1.py --demo
  python tools/compare.py work_dirs/retinanet_focal work_dirs/retinanet_poly1 --out report.html

  # all seeds of a table of tools/reproduce.py, with more pictures
  python tools/compare.py work_dirs/reproduce/polyloss_coco/*/seed_*/run --pictures 20
"""

Kind = Literal["bbox", "segm"]
KINDS: dict[Kind, str] = {"bbox": "boxes", "segm": "masks"}
IOU = 0.5
"""From which on a detection is right, in the pictures and for calibration."""

# Okabe and Ito's colours, then the same in other strokes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STROKES = ("solid", "dashed", "dotted", "dashdot")
_LOWER_IS_BETTER = re.compile(
    r"ece|ace|lrp|nll|brier|loss|_err$|mA[TSOVA]E$",  # the last two are of nuScenes
    re.IGNORECASE,
)
# Of a config, what differs from run to run whatever was compared.
_NOT_A_SETTING = re.compile(
    r"^(work_dir|experiment_name|load_from|resume|launcher|visualizer)(\.|$)|\.(ann_file|img)$"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dirs", nargs="+", metavar="WORK_DIR", help="of finished trainings")
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="the report (default: report.html)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=6,
        metavar="N",
        help="on which the runs differ most (default: 6)",
    )
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Detections:
    """What the kept detections of one run, boxes or masks, say beyond its logged numbers.

    Attributes:
        coco: Average precision and recall, and the curves.
        calibration: Of the scores.
        matches: Which detections are right.
        boxes: x, y, width, height in pixels of the detections in ``matches``, (N, 4).
        pictures: Their pictures' ids, (N,).
        threshold: The score from which on the detections have the highest F1 of all thresholds.
    """

    coco: CocoResult
    calibration: DetectionResult
    matches: MatchedDetections
    boxes: NDArray[np.float64]
    pictures: NDArray[np.int64]
    threshold: float

    @property
    def shown(self) -> NDArray[np.bool_]:
        """The detections that a person would look at: from the threshold on, not in a crowd."""
        return (self.matches.score >= self.threshold) & ~self.matches.matches[IOU].ignored


@dataclass
class Comparison:
    """Runs by their names, and what they hold of each kind of detections."""

    runs: dict[str, TrainedRun]
    detections: dict[Kind, dict[str, Detections]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the runs, in the order in which they were given."""
        return list(self.runs)

    def style(self, name: str) -> dict[str, Any]:
        """How a run's line is drawn, the same in every figure."""
        number = self.names.index(name)
        stroke = STROKES[number // len(COLORS) % len(STROKES)]
        return {"color": COLORS[number % len(COLORS)], "linestyle": stroke, "label": name}


def read_comparison(work_dirs: Sequence[str]) -> Comparison:
    """Read the work directories, and measure what their detections say.

    Raises:
        UserError: One is no finished training, or they were not evaluated on the same data.
    """
    folders = [Path(os.path.abspath(folder)) for folder in work_dirs]
    if len(set(folders)) < 2:
        raise UserError("a comparison takes two work directories or more, got one.")
    runs = [read_trained_run(folder) for folder in dict.fromkeys(folders)]
    for run in runs[1:]:
        if not runs[0].evaluated_as(run):
            raise UserError(
                f"{runs[0].folder} and {run.folder} were evaluated on different data "
                f"({_data(runs[0])} and {_data(run)}): compare runs on the same data."
            )
    common = os.path.commonpath([run.folder for run in runs])
    comparison = Comparison({run.folder.relative_to(common).as_posix(): run for run in runs})
    if runs[0].annotation_file is not None:
        _add_detections(comparison)
    return comparison


def _data(run: TrainedRun) -> str:
    dataset = run.config.val_dataloader.dataset
    return str(run.annotation_file or dataset.get("data_root") or dataset.get("root"))


def _add_detections(comparison: Comparison) -> None:
    lacking = [name for name, run in comparison.runs.items() if not run.results]
    for name in lacking:
        comparison.notes.append(
            f"{name} keeps no detections, so parts of this report are without it; tools/test.py "
            f"CONFIG CHECKPOINT --out {comparison.runs[name].folder}/val.json writes them."
        )
    if len(lacking) == len(comparison.runs):
        return
    truth = next(
        (r.annotation_file for r in comparison.runs.values() if _is_file(r.annotation_file)), None
    )
    if truth is None:
        comparison.notes.append(
            f"{_data(next(iter(comparison.runs.values())))} is not there any more, so nothing "
            "could be measured from the detections."
        )
        return
    for name, run in comparison.runs.items():
        for kind, file in run.results.items():
            found = _measure(run, truth, file, kind)  # type: ignore[arg-type]
            comparison.detections.setdefault(kind, {})[name] = found  # type: ignore[arg-type]
            logged = run.measured.get(f"{kind}_mAP", math.nan)
            if abs(logged - found.coco.stats["mAP"]) > 1e-3:
                comparison.notes.append(
                    f"{file} has {kind} mAP {found.coco.stats['mAP']:.3f} and the last evaluation "
                    f"{logged:.3f}: these are not its detections."
                )


def _is_file(file: Path | None) -> bool:
    return file is not None and file.is_file()


def _measure(run: TrainedRun, truth: Path, file: Path, kind: Kind) -> Detections:
    evaluator = run.config.val_evaluator
    evaluator = evaluator[0] if isinstance(evaluator, list) else evaluator
    max_dets = evaluator.get("max_dets", 100)
    coco = evaluate(truth, file, kind, max_dets)
    calibration = DetectionCalibration(IOU)
    calibration.update(truth, file, kind, max_dets)
    matches = match(truth, file, [IOU], kind, max_dets)
    results = json.loads(file.read_text(encoding="utf-8"))
    kept = [results[row] for row in matches.index]
    at_iou = matches.matches[IOU]
    return Detections(
        coco=coco,
        calibration=calibration.compute(),
        matches=matches,
        boxes=np.array([one["bbox"] for one in kept], dtype=np.float64).reshape(-1, 4),
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


def differing_settings(runs: dict[str, TrainedRun]) -> dict[str, list[str]]:
    """Settings of the configs that are not the same in all runs, each run's value."""
    flat = [dict(_flat(run.config.to_dict())) for run in runs.values()]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one)]
    table = {key: [one.get(key, "") for one in flat] for key in keys}
    return {
        key: values
        for key, values in table.items()
        if len(set(values)) > 1 and not _NOT_A_SETTING.search(key)
    }


def _flat(node: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple) and any(isinstance(one, dict) for one in node):
        children = enumerate(node)
    else:
        yield prefix, str(node)
    for key, value in children:
        if not str(key).startswith("_"):  # MMEngine's scopes, and the names of its own variables
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def result_rows(comparison: Comparison) -> dict[str, list[float]]:
    """The last evaluation's numbers of every run by their names; NaN where there is none."""
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


def class_rows(found: dict[str, Detections], names: Sequence[str]) -> dict[str, list[float]]:
    """Average precision of each class in every run."""
    classes = next(iter(found.values())).coco.per_class
    nan = dict.fromkeys(classes, math.nan)
    per_run = [found[name].coco.per_class if name in found else nan for name in names]
    return {one: [numbers[one] for numbers in per_run] for one in classes}


def cost_rows(runs: dict[str, TrainedRun]) -> dict[str, list[str]]:
    """How long a run trained, at which cost, and from which seed; rows of which one run knows."""
    rows: dict[str, list[str]] = {}
    for run in runs.values():
        times = [record["time"] for record in run.training if "time" in record]
        memory = [record["memory"] for record in run.training if "memory" in record]
        seed = (run.config.get("randomness") or {}).get("seed")
        cells = {
            "epochs": f"{run.config.train_cfg.get('max_epochs') or ''}",
            "last logged iteration": f"{run.training[-1]['iter']:g}",
            "seconds an iteration, median": f"{median(times):.3f}" if times else "",
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
    by_epoch = next(iter(runs.values())).config.train_cfg.get("max_epochs")
    axes[-1].set(title=_shown(shown or ""), xlabel="epoch" if by_epoch else "iteration")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _legend(figure, axes)


def draw_precision(comparison: Comparison, found: dict[str, Detections]) -> Figure:
    """Precision against recall, the mean over the classes."""
    figure, axes = _axes(2)
    for axis, (row, iou) in zip(axes, ((0, 0.5), (5, 0.75)), strict=True):
        for name, one in found.items():
            axis.plot(np.linspace(0, 1, 101), one.coco.precision[row], **comparison.style(name))
        axis.set(title=f"IoU {iou}", xlabel="recall", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("precision")
    return _legend(figure, axes)


def draw_calibration(comparison: Comparison, found: dict[str, Detections]) -> Figure:
    """Precision against score, which are equal for calibrated scores; and how many there are."""
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
class Picture:
    """One on which the runs differ: its id and file, and F1 of each run."""

    id: int
    file: Path
    f1: dict[str, float]

    @property
    def difference(self) -> float:
        """Between the best and the worst run."""
        return max(self.f1.values()) - min(self.f1.values())


def differing_pictures(
    content: dict[str, Any], image_dir: Path, found: dict[str, Detections], number: int
) -> list[Picture]:
    """The pictures with the largest difference in F1 at each run's own best threshold.

    Args:
        content: Of the annotation file.
        image_dir: Of the pictures.
        found: By the runs' names.
        number: Most pictures to return; those on which the runs agree are left out.
    """
    ids = np.array([image["id"] for image in content["images"]])
    order = np.argsort(ids)
    objects = [one["image_id"] for one in content["annotations"] if not one["iscrowd"]]

    def count(pictures: Any) -> NDArray[np.int64]:
        rows = order[np.searchsorted(ids[order], np.asarray(pictures, dtype=np.int64))]
        return np.bincount(rows, minlength=len(ids))

    num_objects = count(objects)
    f1 = {}
    for name, one in found.items():
        shown = one.shown
        right = count(one.pictures[shown & one.matches.matches[IOU].right])
        both = count(one.pictures[shown]) + num_objects
        f1[name] = np.where(both > 0, 2 * right / np.maximum(both, 1), 1.0)
    pictures = [
        Picture(
            image["id"],
            image_dir / image["file_name"],
            {name: float(values[row]) for name, values in f1.items()},
        )
        for row, image in enumerate(content["images"])
    ]
    pictures = [one for one in pictures if one.difference > 0]
    return sorted(pictures, key=lambda one: (-one.difference, one.id))[:number]


def draw_picture(picture: Picture, content: dict[str, Any], found: dict[str, Detections]) -> Figure:
    """The ground truth, then the detections of each run: right ones green, wrong ones orange."""
    image = np.asarray(Image.open(picture.file).convert("RGB"))
    truth = [
        one
        for one in content["annotations"]
        if one["image_id"] == picture.id and not one["iscrowd"]
    ]
    columns = min(3, len(found) + 1)
    rows = -(-(len(found) + 1) // columns)
    height = 4.0 * image.shape[0] / image.shape[1] + 0.3
    figure = Figure(figsize=(4.0 * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(image)
    axes[0].set_title(f"{len(truth)} objects", fontsize=8)
    _boxes(axes[0], [one["bbox"] for one in truth], "#0072B2")
    for axis, (name, one) in zip(axes[1:], found.items(), strict=False):
        here = one.shown & (one.pictures == picture.id)
        right = one.matches.matches[IOU].right
        axis.imshow(image)
        axis.set_title(
            f"{name}: {(here & right).sum()} right, {(here & ~right).sum()} wrong, "
            f"F1 {picture.f1[name]:.2f}",
            fontsize=8,
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


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0;
  background: #fff; }
thead th { border-bottom: 2px solid #888; }
td.best { font-weight: 700; background: #eaf4fb; }
td.text { font-family: ui-monospace, monospace; font-size: .85em; text-align: left; }
table:has(td.text) th { text-align: left; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
p.note { border-left: 4px solid #E69F00; padding-left: .8rem; }
p { max-width: 60rem; } nav a { margin-right: 1rem; }
"""


def report(comparison: Comparison, num_pictures: int) -> str:
    """The whole report, one page of HTML that asks for nothing else."""
    sections: dict[str, list[str]] = {}

    def add(title: str, *parts: str) -> None:
        sections.setdefault(title, []).extend(parts)

    names = comparison.names
    results = {_shown(key): values for key, values in result_rows(comparison).items()}
    add(
        "Results",
        "<p>The last evaluation of every run; the best of a row is marked. Two single runs differ "
        "by chance too: tools/reproduce.py compares over seeds.</p>",
        number_table(names, results, {key for key in results if _LOWER_IS_BETTER.search(key)}),
    )
    add("Cost", text_table(names, cost_rows(comparison.runs)))
    settings = differing_settings(comparison.runs)
    add(
        "Settings that differ",
        text_table(names, settings, "text") if settings else "<p>None but the folders.</p>",
    )
    add(
        "Training",
        "<p>Values of different losses cannot be compared with each other, their courses can.</p>",
        image_of(draw_training(comparison), "losses and evaluations over the training"),
    )
    for kind, found in comparison.detections.items():
        what = KINDS[kind]
        rows = class_rows(found, names)
        add("Average precision by class", f"<h3>{what}</h3>", number_table(names, rows))
        add(
            "Precision and recall",
            f"<h3>{what}</h3><p>Mean over the classes.</p>",
            image_of(draw_precision(comparison, found), f"precision against recall of {what}"),
        )
        add(
            "Calibration",
            f"<h3>{what}</h3><p>How many of the detections of a score are right, at IoU {IOU}. "
            "On the dotted line the score is the probability.</p>",
            image_of(draw_calibration(comparison, found), f"reliability of {what}"),
        )
    if comparison.detections and num_pictures > 0:
        add("Pictures", *_pictures(comparison, num_pictures))
    parts = [f'<p class="note">{html.escape(note)}</p>' for note in comparison.notes]
    links = "".join(f'<a href="#{_anchor(t)}">{html.escape(t)}</a>' for t in sections)
    for title, body in sections.items():
        heading = f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>'
        parts.append(f"<section>{heading}{''.join(body)}</section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison of {len(names)} runs</title><style>{STYLE}</style></head><body>"
        f"<h1>Comparison of {len(names)} runs</h1><nav>{links}</nav>{''.join(parts)}"
        "</body></html>\n"
    )


def _pictures(comparison: Comparison, number: int) -> list[str]:
    kind: Literal["bbox", "segm"] = "bbox" if "bbox" in comparison.detections else "segm"
    found = comparison.detections[kind]
    if len(found) < 2:
        return ["<p>Only one run keeps its detections.</p>"]
    run = comparison.runs[next(iter(found))]
    assert run.annotation_file is not None
    truth = next(r.annotation_file for r in comparison.runs.values() if _is_file(r.annotation_file))
    assert truth is not None
    content = read_annotations(truth, pictures=False).content
    pictures = differing_pictures(content, run.image_dir, found, number)
    thresholds = ", ".join(f"{name} {one.threshold:.2f}" for name, one in found.items())
    parts = [
        "<p>Those with the largest difference in F1 between the best and the worst run. Every run "
        "is shown from its own best score on, since losses differ in how sure they make a model: "
        f"{html.escape(thresholds)}. Blue: the objects; green: right, with IoU {IOU} or more; "
        "orange: wrong.</p>"
    ]
    if not pictures:
        parts.append("<p>The runs agree on all pictures.</p>")
    for picture in pictures:
        name = picture.file.name
        if not picture.file.is_file():
            parts.append(f"<p>{html.escape(str(picture.file))} is not there any more.</p>")
            continue
        drawn = image_of(draw_picture(picture, content, found), name, "jpeg")
        parts.append(f"<h3>{html.escape(name)}, difference {picture.difference:.2f}</h3>{drawn}")
    return parts


def number_table(
    names: Sequence[str], rows: dict[str, list[float]], lower_is_better: Collection[str] = ()
) -> str:
    """Numbers with the best of each row marked, the highest but in the rows that are named."""

    def cells(key: str, values: list[float]) -> Iterable[str]:
        known = [value for value in values if not math.isnan(value)]
        best = (min if key in lower_is_better else max)(known, default=math.nan)
        for value in values:
            marked = ' class="best"' if value == best and len(set(known)) > 1 else ""
            yield f"<td{marked}>{_number(value)}</td>"

    return _table(names, rows, cells)


def text_table(names: Sequence[str], rows: dict[str, list[str]], style: str = "") -> str:
    """Texts as they are."""
    css = f' class="{style}"' if style else ""

    def cells(_: str, values: list[str]) -> Iterable[str]:
        return (f"<td{css}>{html.escape(value)}</td>" for value in values)

    return _table(names, rows, cells)


def _table(
    names: Sequence[str],
    rows: dict[str, list[Any]],
    cells: Callable[[str, list[Any]], Iterable[str]],
) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td>{html.escape(key)}</td>{''.join(cells(key, values))}</tr>"
        for key, values in rows.items()
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def image_of(figure: Figure, alt: str, format_: Literal["svg", "jpeg"] = "svg") -> str:
    """A figure as an element of the page, with its data in it."""
    stream = io.BytesIO()
    metadata = {"Date": None} if format_ == "svg" else None
    figure.savefig(stream, format=format_, dpi=110, metadata=metadata)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    kind = "svg+xml" if format_ == "svg" else format_
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"


def _shown(key: str) -> str:
    return key.replace("bbox_", "box ").replace("segm_", "mask ")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def run(args: argparse.Namespace) -> None:
    """Write the report, and show the results."""
    if args.pictures < 0:
        raise UserError(f"--pictures takes 0 or more, got {args.pictures}.")
    comparison = read_comparison(args.work_dirs)
    text = report(comparison, args.pictures)
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, text)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    console = Console()
    table = Table("", *comparison.names)
    for key, values in result_rows(comparison).items():
        table.add_row(_shown(key), *(_number(value) for value in values))
    console.print(table)
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"report {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
