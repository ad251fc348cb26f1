"""Losses whose positives learn a quality, such as an overlap, instead of 1.

Every entry is computed as a negative, by the passes of the focal family. Then the one positive
entry of each row is put in its place, in closed form. Only those passes make buffers of the
logits' size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfocal._torch import can_read
from polyfocal.ops import fused
from polyfocal.ops.poly_focal import PolyFocal, compute_dtype, softplus

_TINY = 1e-12  # a smaller distance or probability has no slope, whatever its power


class Quality(NamedTuple):
    """Coefficients of a loss whose positives have a target y in [0, 1].

    Attributes:
        negatives: the loss of the entries with target 0.
        negative, positive: the weights of both.
        epsilon: epsilon of the positives.
        beta: power of the positives' modulator |y - p|. None for no modulator: then the term of
            epsilon is the first one in the expansion of the loss around y.
        by_score: whether y weighs the positives.
        power: y is raised to it first.
        mix: y is then mixed with the prediction, p^mix y^(1 - mix).
        floor: y is at least this.
        detached: whether the modulator of the negatives has no gradient.
    """

    negatives: PolyFocal
    negative: float = 1.0
    positive: float = 1.0
    epsilon: float = 0.0
    beta: float | None = None
    by_score: bool = False
    power: float = 1.0
    mix: float = 0.0
    floor: float = 0.0
    detached: bool = False


def quality_targets(p: Tensor, y: Tensor, quality: Quality) -> Tensor:
    """What the positives learn, from their probabilities and scores in [0, 1]."""
    if quality.power != 1:
        y = y**quality.power
    if quality.mix:
        # At p = 0 a small power would jump, and whether p is 0 there is rounding.
        p = p.detach().clamp_min(torch.finfo(p.dtype).tiny)
        y = p**quality.mix * y ** (1 - quality.mix)
    return y.clamp_min(quality.floor) if quality.floor else y


def quality_positives(p: Tensor, rest: Tensor, ce: Tensor, y: Tensor, quality: Quality) -> Tensor:
    """The losses of positives, differentiable.

    Args:
        p, rest: their probability p, and 1 - p without the rounding of that difference.
        ce: their binary cross-entropy against y.
        y: what they learn.
        quality: coefficients.
    """
    gap = y * rest - (1 - y) * p
    if quality.beta is not None:
        distance = gap.abs().clamp_min(_TINY)
        loss = distance**quality.beta * (ce + quality.epsilon * distance)
    elif quality.epsilon:
        loss = ce + quality.epsilon * leading_excess(p, rest, y, gap)
    else:
        loss = ce
    if quality.positive != 1:
        loss = loss * quality.positive
    return loss * y if quality.by_score else loss


def leading_excess(p: Tensor, rest: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    """The first term of the excess of binary cross-entropy over its least value, at p = y.

    It is p - y - y log(p / y) for p above y. Below y it is the same function of 1 - p and 1 - y.
    """
    above = gap < 0
    q, t = torch.where(above, p, rest), torch.where(above, y, 1 - y)
    return gap.abs() - t * torch.log(q.clamp_min(torch.finfo(q.dtype).tiny)) + torch.xlogy(t, t)


def _closed(x: Tensor, y: Tensor, quality: Quality) -> tuple[Tensor, Tensor]:
    """The losses of positives with logits x and scores y, and their derivatives by x."""
    p, rest = torch.sigmoid(x), torch.sigmoid(-x)
    y = quality_targets(p, y, quality)
    ce = y * softplus(-x) + (1 - y) * softplus(x)
    gap = y * rest - (1 - y) * p
    epsilon = quality.epsilon
    if quality.beta is None:
        slope = -gap * (1 + epsilon * torch.where(gap < 0, rest, p))
    else:
        distance = gap.abs().clamp_min(_TINY)
        modulator = distance**quality.beta
        by_distance = quality.beta * modulator / distance * ce
        by_distance = by_distance + epsilon * (quality.beta + 1) * modulator
        away = torch.where(gap.abs() < _TINY, 0.0, gap.sign())
        slope = -away * p * rest * by_distance - modulator * gap
    loss = quality_positives(p, rest, ce, y, quality)
    slope = slope * quality.positive
    return loss, slope * y if quality.by_score else slope


def _positives_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, their columns, and which of them are positives, None for all.

    On a CPU these are the rows with a label of the foreground. Elsewhere they are all rows, because
    counting the positives would wait for the device.
    """
    foreground = labels < logits.shape[1]
    if can_read(labels) and can_read(logits):
        rows = foreground.nonzero().squeeze(1)
        return rows, labels[rows], None
    rows = torch.arange(len(labels), device=labels.device)
    return rows, torch.where(foreground, labels, 0), foreground


def _at(scale: Tensor | float | None, rows: Tensor, columns: Tensor) -> Tensor | float:
    if not isinstance(scale, Tensor):
        return 1.0 if scale is None else scale
    if scale.dim() == 1:
        return scale[columns]
    return scale[rows, 0] if scale.shape[1] == 1 else scale[rows, columns]


def _put(into: Tensor, rows: Tensor, columns: Tensor, value: Tensor, mask: Tensor | None) -> None:
    value = value.to(into.dtype)
    into[rows, columns] = value if mask is None else torch.where(mask, value, into[rows, columns])


def composed_quality(
    pred: Tensor,
    labels: Tensor,
    scores: Tensor,
    quality: Quality,
    per_class: Tensor | float = 1.0,
    weight: Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    """Weighted binary losses of the entries, of differentiable operations.

    Args:
        pred: logits (N, C), or probabilities with ``activated``.
        labels: (N,) int64 in [0, C], C being background; or the shape of ``scores`` (N, C), True
            at the positives.
        scores: (N,), or (N, C) in [0, 1].
        quality: coefficients.
        per_class: a number or (C,).
        weight: broadcasts over the logits; None for 1.
        activated: ``pred`` are probabilities.

    Returns:
        The shape of ``pred``; float64 for float64, else float32.
    """
    pred = pred.to(compute_dtype(pred))
    loss = _negatives(pred, quality, activated)
    if labels.shape == scores.shape == pred.shape:
        put = _of_positives(pred, scores, quality, activated)
        loss = torch.where(labels, put, loss)
    elif len(pred):
        foreground = (labels < pred.shape[1]).unsqueeze(1)
        column = torch.where(foreground, labels.unsqueeze(1), 0)
        score = torch.where(foreground, scores.unsqueeze(1), 0.5)
        put = _of_positives(pred.gather(1, column), score, quality, activated)
        loss = loss.scatter(1, column, torch.where(foreground, put, loss.gather(1, column)))
    loss = loss * per_class
    return loss if weight is None else loss * weight


def _negatives(pred: Tensor, quality: Quality, activated: bool) -> Tensor:
    p = pred if activated else torch.sigmoid(pred)
    # One number, expanded to the shape of a target.
    ce = (
        F.binary_cross_entropy(p, p.new_zeros(()).expand_as(p), reduction="none")
        if activated
        else softplus(pred)
    )
    modulated = p.detach() if quality.detached else p
    loss = ce + quality.epsilon * p
    gamma = quality.negatives.gamma
    if gamma:
        loss = loss * modulated.clamp_min(_TINY if gamma < 1 else 0.0) ** gamma
    return loss * quality.negative


def _of_positives(pred: Tensor, y: Tensor, quality: Quality, activated: bool) -> Tensor:
    p = pred if activated else torch.sigmoid(pred)
    rest = 1 - pred if activated else torch.sigmoid(-pred)
    y = quality_targets(p, y, quality)
    if activated:
        ce = F.binary_cross_entropy(p, y, reduction="none")
    else:
        ce = y * softplus(-pred) + (1 - y) * softplus(pred)
    return quality_positives(p, rest, ce, y, quality)


def quality_loss(
    logits: Tensor,
    labels: Tensor,
    scores: Tensor,
    quality: Quality,
    per_class: Tensor | float = 1.0,
    weight: Tensor | None = None,
    reduce: bool = False,
    scale: Tensor | float = 1.0,
    activated: bool = False,
) -> Tensor:
    """As :func:`composed_quality`, or the sum times ``scale``; fused if there is such a pass.

    Backward keeps the logits.
    """
    backend = None
    if not (activated or quality.detached) and labels.shape != logits.shape:
        backend = fused._backend(logits, weight, per_class)
    if backend is None:
        loss = composed_quality(logits, labels, scores, quality, per_class, weight, activated)
        return loss.sum() * scale if reduce else loss
    return _Quality.apply(
        logits, labels, scores, weight, per_class, quality, scale if reduce else None, backend
    )


class _Quality(torch.autograd.Function):
    """The sum times ``scale``, or, without one, the losses of the entries."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        scores: Tensor,
        weight: Tensor | None,
        per_class: Tensor | float,
        quality: Quality,
        scale: Tensor | float | None,
        backend: Any,
    ) -> Tensor:
        # The positives weigh nothing in the pass.
        arguments = (logits, labels, quality.negatives, 0.0, per_class * quality.negative, weight)
        loss, gradient = fused.one_pass(ctx, backend, arguments, scale is not None)
        rows, columns, mask = _positives_of(logits, labels)
        put, slope = _closed(logits[rows, columns].to(loss.dtype), scores[rows], quality)
        each = _at(per_class, rows, columns) * _at(weight, rows, columns)
        put = put * each
        if gradient is not None:
            _put(gradient, rows, columns, slope * each, mask)
        ctx.quality, ctx.scale, ctx.backend = quality, scale, backend
        ctx.number = None if isinstance(per_class, Tensor) else per_class
        tensor = per_class if isinstance(per_class, Tensor) else None
        ctx.save_for_backward(logits, labels, scores, weight, gradient, tensor)
        if scale is None:
            _put(loss, rows, columns, put, mask)
            return loss
        return (loss + (put if mask is None else torch.where(mask, put, 0.0)).sum()).mul_(scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, scores, weight, gradient, tensor = ctx.saved_tensors
        per_class = ctx.number if tensor is None else tensor
        reduce = ctx.scale is not None
        if reduce:
            upstream = upstream * ctx.scale
        if torch.is_grad_enabled():

            def loss(x: Tensor) -> Tensor:
                each = composed_quality(x, labels, scores, ctx.quality, per_class, weight)
                return each.sum() if reduce else each

            gradient = fused._second_order(loss, logits, upstream)
        elif gradient is not None:
            gradient = gradient * upstream
        else:
            negative = per_class * ctx.quality.negative
            arguments = (logits, labels, ctx.quality.negatives, 0.0, negative, weight, reduce)
            _, gradient = ctx.backend.sigmoid(
                *arguments, fused._path == "auto", want_loss=False, upstream=upstream
            )
            rows, columns, mask = _positives_of(logits, labels)
            x = logits[rows, columns].to(compute_dtype(logits))
            slope = _closed(x, scores[rows], ctx.quality)[1]
            slope = slope * _at(per_class, rows, columns) * _at(weight, rows, columns)
            slope = slope * (upstream if reduce else upstream[rows, columns])
            _put(gradient, rows, columns, slope, mask)
        return gradient, None, None, None, None, None, None, None
