"""Pictures of scans from above: points, ground truth and predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mmdet3d.structures import Det3DDataSample
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from numpy.typing import NDArray
from torch import Tensor

from polyfocal.data.files import free_name
from polyfocal.mmengine.objects import unwrapped
from polyfocal.mmengine.registry import HOOKS

_NUM_PICTURES = 12
_SCORE_THRESHOLD = 0.3  # of the drawn detections
_INCHES_A_METRE = 0.2
_TRUTH, _PREDICTION = "tab:green", "tab:red"


def draw_from_above(
    file: Path, points: Tensor, sample: Det3DDataSample, classes: Sequence[str]
) -> None:
    """Write a picture of a scan with its ground truth and what a model found.

    Args:
        file: The picture; the end of its name says the format.
        points: (N, 3 or more), x ahead, y to the left, z up, in metres; their colour is z.
        sample: With ``pred_instances_3d`` and, to draw the boxes of the truth, ``eval_ann_info``.
        classes: Names by label.
    """
    xyz = points[:, :3].cpu().numpy()
    low, high = xyz[:, :2].min(0, initial=0.0), xyz[:, :2].max(0, initial=1.0)
    width, height = (high - low) * _INCHES_A_METRE
    figure = Figure(figsize=(max(width, 4.0), max(height, 3.0) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(xyz[:, 0], xyz[:, 1], c=xyz[:, 2], s=0.4, cmap="gray_r", vmin=-3, vmax=1)
    truth = sample.get("eval_ann_info") or {}
    if "gt_bboxes_3d" in truth:
        labels = truth["gt_labels_3d"]
        names = [classes[label] for label in labels]
        _draw_boxes(axes, _outlines(truth["gt_bboxes_3d"]), names, _TRUTH, "truth")
    found = sample.pred_instances_3d
    found = found[found.scores_3d >= _SCORE_THRESHOLD]
    names = [
        f"{classes[label]} {score:.2f}"
        for label, score in zip(found.labels_3d, found.scores_3d, strict=True)
    ]
    _draw_boxes(axes, _outlines(found.bboxes_3d), names, _PREDICTION, "prediction")
    axes.set(
        xlim=(low[0], high[0]),
        ylim=(low[1], high[1]),
        aspect="equal",
        xlabel="x / m",
        ylabel="y / m",
    )
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=100)


def draw_predictions(runner: Runner) -> Path:
    """Draw a dozen scans of the val split from above; returns the folder."""
    dataset = runner.val_dataloader.dataset
    folder = Path(runner.work_dir) / "predictions"
    folder.mkdir(exist_ok=True)
    model = unwrapped(runner.model)
    model.eval()
    taken: set[str] = set()
    for index in range(0, len(dataset), -(-len(dataset) // _NUM_PICTURES)):
        batch = pseudo_collate([dataset[index]])
        (points,) = batch["inputs"]["points"]
        with torch.no_grad():
            (sample,) = model.test_step(batch)
        draw_from_above(_file(folder, sample, taken), points, sample, dataset.metainfo["classes"])
    return folder


@HOOKS.register_module()
class DrawFromAboveHook(Hook):
    """Draws every scan of a test.

    Args:
        folder: Below the folder of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._taken: set[str] = set()

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw the scans of a batch."""
        folder = Path(runner.work_dir) / runner.timestamp / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        classes = runner.test_dataloader.dataset.metainfo["classes"]
        for points, sample in zip(data_batch["inputs"]["points"], outputs, strict=True):
            draw_from_above(_file(folder, sample, self._taken), points, sample, classes)


def _file(folder: Path, sample: Det3DDataSample, taken: set[str]) -> Path:
    """A file for a scan; scans in two folders may have one name."""
    return folder / f"{free_name(Path(sample.lidar_path).stem, taken)}.png"


def _outlines(boxes: Any) -> NDArray[np.float64]:
    """Rectangles seen from above, (N, 5, 2): the corners, then the middle of the front."""
    x, y, length, width, yaw = boxes.bev.double().cpu().numpy().T
    along = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1) * length[:, None] / 2
    across = np.stack([-np.sin(yaw), np.cos(yaw)], axis=-1) * width[:, None] / 2
    centre = np.stack([x, y], axis=-1)
    corners = [along + across, along - across, -along - across, -along + across, along]
    return np.stack([centre + corner for corner in corners], axis=1)


def _draw_boxes(
    axes: Axes, outlines: NDArray[np.float64], names: list[str], color: str, label: str
) -> None:
    middle = outlines[:, :4].mean(axis=1, keepdims=True)
    paths = [*outlines[:, [0, 1, 2, 3, 0]], *np.concatenate([middle, outlines[:, 4:]], axis=1)]
    axes.add_collection(LineCollection(paths, colors=color, linewidths=1.2, label=label))
    # The truth's names above its boxes and the predictions' below, so that both can be read.
    side = 1 if color == _TRUTH else -1
    for outline, name in zip(outlines[:, :4], names, strict=True):
        edge = outline[:, 1].max() if side > 0 else outline[:, 1].min()
        axes.annotate(
            name,
            (outline[:, 0].mean(), edge),
            xytext=(0, 2 * side),
            textcoords="offset points",
            color=color,
            fontsize=7,
            ha="center",
            va="bottom" if side > 0 else "top",
            annotation_clip=True,
        )
