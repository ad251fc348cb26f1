"""Calibration of a classifier's probabilities.

The measures are functions of all samples; :class:`ClassificationCalibration` collects samples over
batches and processes and computes them all.

Bins of equal width are ``[0, 1/B), [1/B, 2/B), ..., [1 - 1/B, 1]``. The last bin is closed, so that
it holds a confidence of 1. An empty bin does not count.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from polyfocal.data.detections import ROUNDING
from polyfocal.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """What fell into each bin: the content of a reliability diagram.

    Attributes:
        edges: Borders of the bins in rising order, (B + 1,).
        count: Samples in each bin, (B,).
        confidence: Mean confidence in each bin, (B,); NaN for an empty bin.
        target: Mean of what the confidence should be, such as the accuracy, (B,); NaN for an empty
            bin.
    """

    edges: Floats
    count: Integers
    confidence: Floats
    target: Floats

    @property
    def gap(self) -> Floats:
        """|target - confidence| of each bin, 0 for an empty bin, (B,)."""
        return np.nan_to_num(np.abs(self.target - self.confidence))

    @property
    def expected_error(self) -> float:
        """The mean gap of the bins, weighted by their counts; NaN without samples."""
        total = self.count.sum()
        return float(self.count @ self.gap / total) if total else float("nan")

    @property
    def maximum_error(self) -> float:
        """The largest gap; NaN without samples."""
        return float(self.gap.max()) if self.count.any() else float("nan")


@dataclass(frozen=True)
class ClassificationResult:
    """Calibration of a classifier; every value is NaN without samples.

    Attributes:
        accuracy: Part of the samples whose most probable class is right, [0, 1].
        ece: Expected calibration error of the most probable class, bins of equal width, [0, 1]
            (Naeini et al. 2015; Guo et al. 2017).
        adaptive_ece: The same over bins of equal count (Nguyen and O'Connor 2015).
        classwise_ece: Mean over the classes c of the ECE of the probability of c (Kull et al.
            2019).
        mce: Maximum calibration error: the largest gap of a bin of ``ece``.
        brier: Mean over the samples of sum_c (p_c - [y = c])^2, [0, 2].
        nll: Mean of -log p_y in nats, p_y not below the smallest normal float64.
        bins: The reliability diagram of ``ece``.
        class_bins: The diagram of each class; ``classwise_ece`` is the mean of their errors.
    """

    accuracy: float
    ece: float
    adaptive_ece: float
    classwise_ece: float
    mce: float
    brier: float
    nll: float
    bins: Bins
    class_bins: tuple[Bins, ...]


class ClassificationCalibration:
    """Collects probabilities and labels, and measures their calibration.

    Args:
        num_bins: Number of bins, B.

    Example:
        >>> metric = ClassificationCalibration(num_bins=10)
        >>> metric.update([[0.9, 0.1], [0.6, 0.4]], [0, 1])
        >>> round(metric.compute().ece, 3)
        0.35
    """

    def __init__(self, num_bins: int = 15) -> None:
        self.num_bins = check_num_bins(num_bins)
        self._probabilities: list[Floats] = []
        self._labels: list[Integers] = []

    def update(self, probabilities: ArrayLike, labels: ArrayLike) -> None:
        """Add samples.

        Args:
            probabilities: (N, C) in [0, 1] to 1e-6, each row adding up to 1 to 1e-3, or to what
                rounding to bfloat16 makes of it; arrays, lists or torch tensors of any kind.
            labels: (N,) integers in [0, C).

        Raises:
            UserError: They are none of these, or C differs from that of earlier samples.
        """
        p, y = _check_samples(probabilities, labels)
        if self._probabilities and p.shape[1] != self._probabilities[0].shape[1]:
            raise UserError(
                f"probabilities have {p.shape[1]} classes; those before had "
                f"{self._probabilities[0].shape[1]}."
            )
        self._probabilities.append(p)
        self._labels.append(y)

    def merge(self, other: "ClassificationCalibration") -> None:
        """Add the samples that another process or part collected."""
        for p, y in zip(other._probabilities, other._labels, strict=True):
            self.update(p, y)

    def compute(self) -> ClassificationResult:
        """Measure all samples so far."""
        if not self._probabilities:
            raise UserError("there are no samples yet: call update() before compute().")
        p, y = np.concatenate(self._probabilities), np.concatenate(self._labels)
        rows = np.arange(len(y))
        predicted = p.argmax(axis=1)
        confidence, right = p[rows, predicted], (predicted == y).astype(np.float64)
        bins = equal_width_bins(confidence, right, self.num_bins)
        class_bins = tuple(
            equal_width_bins(p[:, c], (y == c).astype(np.float64), self.num_bins)
            for c in range(p.shape[1])
        )
        p_y = p[rows, y]
        return ClassificationResult(
            accuracy=_mean(right),
            ece=bins.expected_error,
            adaptive_ece=equal_count_bins(confidence, right, self.num_bins).expected_error,
            classwise_ece=_mean(np.array([one.expected_error for one in class_bins])),
            mce=bins.maximum_error,
            brier=_mean((p**2).sum(axis=1) - 2 * p_y + 1),
            nll=_mean(-np.log(np.maximum(p_y, np.finfo(np.float64).tiny))),
            bins=bins,
            class_bins=class_bins,
        )


def check_num_bins(num_bins: int) -> int:
    """The number of bins, which must be at least 1."""
    if not isinstance(num_bins, (int, np.integer)) or num_bins < 1:
        raise UserError(f"num_bins must be an integer of 1 or more, got {num_bins!r}.")
    return int(num_bins)


def bin_numbers(
    confidence: Floats, num_bins: int, closed: Literal["left", "right"] = "left"
) -> Integers:
    """The number of the bin of equal width in which each confidence in [0, 1] falls.

    Args:
        confidence: (N,) in [0, 1].
        num_bins: B.
        closed: The side on which the bins hold their border: ``"left"`` is [lo, hi), the last one
            closed on both; ``"right"`` is (lo, hi], the first one closed on both.
    """
    other: Literal["left", "right"] = "right" if closed == "left" else "left"
    return np.searchsorted(_equal_edges(num_bins)[1:-1], confidence, side=other)


def equal_width_bins(
    confidence: Floats,
    target: Floats,
    num_bins: int,
    closed: Literal["left", "right"] = "left",
) -> Bins:
    """Samples in bins of equal width.

    Args:
        confidence: (N,) in [0, 1].
        target: (N,), such as 1 where the prediction is right.
        num_bins: B.
        closed: See :func:`bin_numbers`.
    """
    numbers = bin_numbers(confidence, num_bins, closed)
    return _summarise(confidence, target, numbers, _equal_edges(num_bins))


def equal_count_bins(confidence: Floats, target: Floats, num_bins: int) -> Bins:
    """Samples in bins of equal count: the edges are quantiles, equal confidences stay together.

    Args:
        confidence: (N,) in [0, 1].
        target: (N,), such as 1 where the prediction is right.
        num_bins: B.
    """
    edges = _equal_edges(num_bins)
    if confidence.size:
        edges = np.asarray(np.quantile(confidence, edges), dtype=np.float64)
    numbers = np.searchsorted(edges[1:-1], confidence, side="right")
    return _summarise(confidence, target, numbers, edges)


def _equal_edges(num_bins: int) -> Floats:
    return np.linspace(0.0, 1.0, num_bins + 1, dtype=np.float64)


def _summarise(confidence: Floats, target: Floats, numbers: Integers, edges: Floats) -> Bins:
    size = len(edges) - 1
    count = np.bincount(numbers, minlength=size)
    with np.errstate(invalid="ignore"):
        mean = [
            np.bincount(numbers, weights=values, minlength=size) / count
            for values in (confidence, target)
        ]
    return Bins(edges, count, *mean)


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size and not np.isnan(values).all() else float("nan")


def as_array(values: Any) -> NDArray[Any]:
    """Numbers as an array, also those of torch tensors of any dtype, device and graph."""
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], torch.Tensor):
        values = torch.stack(list(values))
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def in_unit_interval(values: Floats) -> Floats | None:
    """Values clamped to [0, 1] if they leave it only by single-precision rounding; else None.

    Args:
        values: Values in any shape.
    """
    if values.size and not (values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING):
        return None
    return np.clip(values, 0.0, 1.0)


def _check_samples(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    p = as_array(probabilities).astype(np.float64)
    y = as_array(labels)
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise UserError(
            f"probabilities must be (N, C) and labels (N,), got the shapes {p.shape} and {y.shape}."
        )
    inside = in_unit_interval(p)
    if inside is None:
        bad = p[~((p >= 0) & (p <= 1))][0]
        raise UserError(f"probabilities must be in [0, 1], got {bad}: give them after softmax.")
    p = inside
    sums = p.sum(axis=1)
    if p.size and np.abs(sums - 1).max() > _sum_rounding(probabilities):
        bad = sums[np.abs(sums - 1).argmax()]
        raise UserError(f"the probabilities of a sample must add up to 1, got {bad:.6g}.")
    if y.size and (not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]):
        raise UserError(
            f"labels must be integers in [0, {p.shape[1]}), got {y.dtype} from {y.min()} to "
            f"{y.max()}."
        )
    return p, y.astype(np.int64)


def _sum_rounding(probabilities: Any) -> float:
    """How far from 1 the sum of probabilities may be that were rounded to their dtype."""
    first = probabilities[0] if isinstance(probabilities, (list, tuple)) else probabilities
    if isinstance(first, torch.Tensor) and first.is_floating_point():
        epsilon = torch.finfo(first.dtype).eps
    elif np.issubdtype(dtype := getattr(first, "dtype", np.dtype(np.float64)), np.floating):
        epsilon = float(np.finfo(dtype).eps)
    else:
        epsilon = 0.0
    return max(1e-3, 2 * epsilon)
