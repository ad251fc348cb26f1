"""Accuracy of all kinds and calibration, after each evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from rich.table import Table

from polyfocal.calibration import ClassificationCalibration
from polyfocal.errors import UserError
from polyfocal.mmengine.registry import METRICS


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """Top-1, top-K, their averages over classes, accuracy by class frequency, and calibration.

    All in [0, 1], as ``classification/<name>``: ``top1``, ``top<K>``; ``macro_top1``,
    ``macro_top<K>``: the mean of the accuracies of the classes; ``many``, ``medium``, ``few``: the
    mean top-1 of the classes with that many pictures to train on, left out if there are none;
    ``ece`` of 15 bins. A score that equals the label's counts as better. So a model with equal
    scores for all classes gets nothing. Scores that are not finite are wrong, and there is no
    ``ece`` then.

    Args:
        topk: K >= 1.
        class_counts: training pictures of each class; None for no accuracy by frequency.
        shots: a class is few with fewer pictures than the first number, many with more than the
            second. 20 and 100 are those of Liu et al., Large-Scale Long-Tailed Recognition (2019).
        collect_device: where several processes gather their results.
        prefix: in front of the names.
    """

    default_prefix = "classification"

    def __init__(
        self,
        topk: int = 5,
        class_counts: Sequence[int] | None = None,
        shots: tuple[int, int] = (20, 100),
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        if not isinstance(topk, int) or topk < 1:
            raise UserError(f"topk={topk!r} of ClassificationMetric: expected a whole number >= 1")
        self.topk = topk
        self.class_counts = class_counts
        self.shots = shots
        self.measured: dict[str, float] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the scores and the label of each sample of a batch."""
        for sample in data_samples:
            self.results.append((sample["scores"].cpu().numpy(), sample["label"]))

    def compute_metrics(self, results: list[tuple[Any, int]]) -> dict[str, float]:
        """Measure all samples."""
        scores = np.stack([row for row, _ in results]).astype(np.float64)
        labels = np.array([label for _, label in results])
        own = scores[np.arange(len(labels)), labels]
        rank = (scores >= own[:, None]).sum(axis=1)  # 1 is the best
        finite = np.isfinite(scores).all(axis=1)
        rank[~finite] = scores.shape[1] + 1  # the training has diverged: nothing is right
        measured = {}
        present = np.unique(labels)
        for k in dict.fromkeys((1, self.topk)):
            right = rank <= k
            by_class = {c: float(right[labels == c].mean()) for c in present.tolist()}
            measured[f"top{k}"] = float(right.mean())
            measured[f"macro_top{k}"] = float(np.mean(list(by_class.values())))
            if k == 1 and self.class_counts is not None:
                measured.update(self._by_frequency(by_class))
        if finite.all():
            calibration = ClassificationCalibration()
            calibration.update(scores, labels)
            measured["ece"] = float(calibration.compute().ece)
        self.measured = measured
        return measured

    def _by_frequency(self, accuracy: dict[int, float]) -> dict[str, float]:
        groups: dict[str, list[float]] = {"many": [], "medium": [], "few": []}
        assert self.class_counts is not None
        for c, value in accuracy.items():
            count = self.class_counts[c]
            name = "few" if count < self.shots[0] else "many" if count > self.shots[1] else "medium"
            groups[name].append(value)
        return {name: float(np.mean(values)) for name, values in groups.items() if values}

    def table(self) -> Table | None:
        """What was measured last, in per cent, for a terminal; None where nothing was."""
        if not self.measured:
            return None
        table = Table(*self.measured)
        table.add_row(*(f"{100 * value:.1f}" for value in self.measured.values()))
        return table
