"""Reliability diagrams."""

from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from polyfocal.calibration.classification import Bins
from polyfocal.calibration.detection import DetectionResult
from polyfocal.data.files import written_whole

_MAX_CLASSES = 20
_COLUMNS = 5


def draw_reliability(result: DetectionResult) -> Figure:
    """The precision of the detections in each bin of their scores, and how many are in it."""
    figure = Figure(figsize=(5, 5), layout="tight")
    axes = figure.subplots()
    _draw(axes, result.bins)
    axes.set_title(f"D-ECE {result.d_ece:.3f}, {result.bins.count.sum()} detections")
    axes.set_xlabel("score (a bar's shade: part of the detections)")
    axes.set_ylabel("precision")
    return figure


def draw_class_reliability(result: DetectionResult) -> Figure:
    """IoU times precision in each bin of the scores, one panel per class with objects.

    Of more than 20 classes, the 20 with the most objects are shown.
    """
    classes = [(name, one) for name, one in result.classes.items() if one.num_objects]
    classes = sorted(classes, key=lambda item: -item[1].num_objects)[:_MAX_CLASSES]
    columns = min(_COLUMNS, max(1, len(classes)))
    rows = max(1, ceil(len(classes) / columns))
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.9 * rows + 0.4), layout="tight")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(classes) :]:
        axes.set_axis_off()
    for axes, (name, one) in zip(panels, classes, strict=False):
        _draw(axes, one.bins)
        axes.set_title(f"{name}: LaECE {one.la_ece:.3f}", fontsize=9, parse_math=False)
        axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("score")
    figure.supylabel("IoU x precision")
    return figure


def save_diagrams(result: DetectionResult, folder: str | Path, prefix: str = "") -> list[Path]:
    """Write ``{prefix}reliability.png`` and ``{prefix}reliability_by_class.png``.

    Returns:
        The files.

    Raises:
        UserError: The folder cannot be written.
    """
    files = {Path(folder) / f"{prefix}{name}.png": draw for name, draw in DIAGRAMS.items()}
    for file, draw in files.items():
        with written_whole(file) as part:
            draw(result).savefig(part, dpi=120)
    return list(files)


def pixels(figure: Figure) -> np.ndarray:
    """A figure as an RGB picture, (H, W, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw(axes: Axes, bins: Bins) -> None:
    share = bins.count / max(1, int(bins.count.max()))
    for low, high, target, part in zip(
        bins.edges[:-1], bins.edges[1:], bins.target, share, strict=True
    ):
        if part:
            # Bins of few detections are pale, but still visible.
            axes.bar(
                low,
                target,
                width=high - low,
                align="edge",
                color="#0072B2",
                alpha=0.2 + 0.8 * part**0.5,
                edgecolor="white",
                linewidth=0.5,
            )
    filled = bins.count > 0
    axes.plot(bins.confidence[filled], bins.target[filled], ".", color="#D55E00")
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="dashed")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


DIAGRAMS: dict[str, Callable[[DetectionResult], Figure]] = {
    "reliability": draw_reliability,
    "reliability_by_class": draw_class_reliability,
}
"""The diagrams by the names of their files."""
