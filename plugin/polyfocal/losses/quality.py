r"""Losses that teach a class score the quality of the box: IoU-aware losses.

Notation: p = sigmoid(x). y in [0, 1] is the quality of a positive entry, usually the IoU of its
box; y = 0 for a negative entry. The target is one of

``(labels, scores)``
    labels ``(N,)`` in [0, C], C being background, and the qualities ``(N,)`` of the rows; those of
    background rows are not read. Labels stay labels: no ``(N, C)`` target is made.
``labels``
    ``(N,)`` integers: every positive has the quality 1.
``scores``
    ``(N, C)`` in [0, 1]: an entry above 0 is a positive. On a CPU, a matrix with one positive per
    row at most, such as VFNet's head makes, is computed as labels and scores.

A score that leaves [0, 1] only by rounding is clamped. A score further out, or NaN, is refused on
the CPU. Nothing of the target has a gradient.

Every loss is its original at epsilon = 0. For any epsilon >= -1 the loss is non-negative, least at
p = y and grows on either side. For y in {0, 1} it is a Poly-1 focal loss. docs/losses/quality.md
derives the terms.
"""

from typing import Any

import torch
from torch import Tensor

from polyfocal._torch import can_read
from polyfocal.errors import UserError
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import in_unit, prepare
from polyfocal.losses.settings import Form
from polyfocal.ops.poly_focal import compute_dtype
from polyfocal.ops.quality import Quality, quality_loss

Target = Tensor | tuple[Tensor, Tensor] | list[Tensor]

FORM = Form(only=True, what="IoU-aware losses")
_LEAST_BETA = 0.2  # of a negative epsilon


def check_beta(beta: float, epsilon: float) -> None:
    """Raises UserError if the quality focal loss would not be least at p = y."""
    if epsilon < 0 and beta < _LEAST_BETA:
        raise UserError(
            f"epsilon={epsilon} is given with beta={beta}: below epsilon 0 the loss is least at"
            f" p = y only for beta >= {_LEAST_BETA}"
        )


def weighed_quality(
    logits: Tensor,
    target: Target,
    weight: Tensor | None,
    quality: Quality,
    activated: bool = False,
    zero_is_negative: bool = False,
    **common: Any,
) -> Tensor:
    """Checks, computes, weighs and reduces: the one path of the IoU-aware losses.

    Args:
        logits: probabilities with ``activated``.
        target: see the module.
        weight: see :mod:`polyfocal.losses.rows`.
        quality: coefficients.
        activated: what ``logits`` are.
        zero_is_negative: a positive with quality 0 counts as a negative.
        common: ``class_weight``, ``ignore_index``, ``reduction`` and ``avg_factor``.
    """
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 0:
        raise UserError(
            f"got logits {tuple(logits.shape)} {logits.dtype}: expected floating point (N, C) with"
            " at least one column"
        )
    labels, scores = _split(logits, target)
    rows = prepare(logits, labels, weight, True, **common)
    x, labels = rows.logits, rows.target
    if activated:
        x = in_unit(x, "the probabilities range")
    if rows.soft:
        labels, scores = _by_row(labels)
    else:
        if rows.keep is not None:
            labels = torch.where(rows.keep, labels, logits.shape[1])
        # The quality of a background row is not read.
        scores = torch.where(labels < logits.shape[1], scores.detach(), 0.0)
        scores = in_unit(scores.to(compute_dtype(logits)), "the scores of the positives range")
        if zero_is_negative:
            labels = torch.where(scores > 0, labels, logits.shape[1])
    return quality_loss(
        x,
        labels,
        scores,
        quality,
        1.0 if rows.class_weight is None else rows.class_weight,
        rows.weight,
        rows.reduction != "none",
        rows.scale,
        activated,
    )


def _split(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Labels and scores (N,); or the scores (N, C) twice."""
    if isinstance(target, Tensor) and target.shape == logits.shape and target.is_floating_point():
        return target, target
    if isinstance(target, Tensor):
        labels, scores = target, logits.new_ones(len(target) if target.dim() else 1)
    elif isinstance(target, (tuple, list)) and len(target) == 2:
        labels, scores = target
    else:
        raise UserError(
            f"got a target {type(target).__name__}: expected (labels, scores), labels (N,), or"
            " scores of the logits' shape"
        )
    rows = logits.shape[:1]
    if labels.shape != rows or labels.dtype != torch.int64:
        raise UserError(
            f"got labels {tuple(labels.shape)} {labels.dtype} for logits {tuple(logits.shape)}:"
            " expected (N,) of dtype torch.int64, or floating-point scores of the logits' shape"
        )
    if scores.shape != rows or not scores.is_floating_point():
        raise UserError(
            f"got scores {tuple(scores.shape)} {scores.dtype} for labels {tuple(labels.shape)}:"
            " expected floating point of the same shape"
        )
    return labels, scores


def _by_row(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and scores (N,) of a matrix with one positive per row at most, where that can be seen.

    Else which entries of the matrix are positives, and the matrix.
    """
    if can_read(scores) and scores.numel():
        best, column = scores.max(dim=1)
        if torch.count_nonzero(best) == torch.count_nonzero(scores):
            return torch.where(best > 0, column, scores.shape[1]), best
    return scores > 0, scores


class QualityLoss(ClassificationLoss, table=False):
    """What the IoU-aware losses share."""
