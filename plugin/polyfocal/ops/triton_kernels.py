"""Losses and gradients in one pass over the logits, on a GPU, by Triton.

Each kernel reads the logits once, computes in float32 and writes only what
is asked for: one partial sum a block, added up afterwards in a fixed order, or the gradient. No
kernel waits for the device or adds atomically.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyfocal.ops.poly_focal import PolyFocal

_BLOCK = 1024
# One program holds a whole row of the softmax form.
MAX_COLUMNS = 65_536


@triton.jit
def _margin(
    z,
    xi,
    gamma,
    gamma_hc,
    epsilons,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
):
    """f(sigmoid(z)) and its derivative by z; see ``poly_focal.margin_loss``."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u
    # log1p(u), exact to rounding.
    log1p = tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))
    p = tl.where(z >= 0, 1.0 / w, u / w)
    q = tl.where(z >= 0, u / w, 1.0 / w)
    ce = tl.maximum(-z, 0.0) + log1p
    modulator = tl.full(z.shape, 1.0, z.dtype)
    if POWER < 0:
        modulator = tl.exp(gamma * (tl.minimum(-z, 0.0) - log1p))
    else:
        for _ in tl.static_range(POWER):
            modulator *= q
    loss = modulator * ce
    slope = -modulator * (q + gamma * p * ce)
    power = modulator
    if HIGH:
        high = tl.exp(gamma_hc * tl.log(1.0 + p))
        high_slope = high * (gamma_hc * p * q * ce / (1.0 + p) - q)
        loss = (1.0 - xi) * loss + xi * high * ce
        slope = (1.0 - xi) * slope + xi * high_slope
    for j in tl.static_range(TERMS):
        power *= q
        term = tl.load(epsilons + j) * power
        loss += term
        slope -= (gamma + (j + 1)) * p * term
    return loss, slope


@triton.jit
def _sigmoid_kernel(
    logits,
    target,
    weight,
    upstream,
    positive,
    negative,
    epsilons,
    out,
    gradient,
    gamma,
    xi,
    gamma_hc,
    size,
    columns,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
    WEIGHT: tl.constexpr,  # 0 none, 1 a row, 2 an entry
    POSITIVE_BY_CLASS: tl.constexpr,
    NEGATIVE_BY_CLASS: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < size
    row = entry // columns
    column = entry % columns
    x = tl.load(logits + entry, mask=mask, other=0.0).to(tl.float32)
    is_positive = tl.load(target + row, mask=mask, other=-1) == column
    z = tl.where(is_positive, x, -x)
    loss, slope = _margin(
        z, tl.where(is_positive, xi, 0.0), gamma, gamma_hc, epsilons, POWER, TERMS, HIGH
    )
    of_positive = tl.load(positive + column) if POSITIVE_BY_CLASS else positive
    of_negative = tl.load(negative + column) if NEGATIVE_BY_CLASS else negative
    scale = tl.where(is_positive, of_positive, of_negative)
    if WEIGHT == 1:
        scale *= tl.load(weight + row, mask=mask, other=0.0)
    if WEIGHT == 2:
        scale *= tl.load(weight + entry, mask=mask, other=0.0)
    if LOSS:
        if REDUCE:
            tl.store(out + block, tl.sum(tl.where(mask, loss * scale, 0.0), axis=0))
        else:
            tl.store(out + entry, loss * scale, mask=mask)
    if GRADIENT:
        if REDUCE:
            scale *= tl.load(upstream)
        else:
            scale *= tl.load(upstream + entry, mask=mask, other=0.0)
        value = tl.where(is_positive, slope, -slope) * scale
        tl.store(gradient + entry, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_kernel(
    logits,
    target,
    weight,
    upstream,
    epsilons,
    margin_of,
    out,
    gamma,
    xi,
    gamma_hc,
    columns,
    lowest,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(logits + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    is_label = column == tl.load(target + row)
    at_label = tl.sum(tl.where(is_label, x, 0.0), axis=0)
    others = tl.where(is_label | (column >= columns), lowest, x)
    highest = tl.max(others, axis=0)
    rest = highest + tl.log(tl.sum(tl.exp(others - highest), axis=0))
    # One number a row, as a block of one, since blocks are what _margin takes.
    z = tl.full((1,), 0.0, x.dtype) + (at_label - rest)
    loss, slope = _margin(z, xi, gamma, gamma_hc, epsilons, POWER, TERMS, HIGH)
    scale = tl.full((1,), 1.0, x.dtype)
    if WEIGHT:
        scale *= tl.load(weight + row)
    if GRADIENT:
        scale *= tl.load(upstream) if REDUCE else tl.load(upstream + row)
        slope *= scale
        value = tl.where(is_label, slope, -slope * tl.exp(others - rest))
        tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(margin_of + row, at_label - rest)
        tl.store(out + row + tl.arange(0, 1), loss * scale)


@functools.lru_cache(maxsize=64)
def _epsilons(epsilons: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(epsilons or (0.0,), device=device)


def _branches(poly: PolyFocal) -> dict[str, int | bool]:
    """What of the coefficients is a branch of the code."""
    return {
        "POWER": int(poly.gamma) if poly.gamma in (0, 1, 2, 3, 4, 5) else -1,
        "TERMS": len(poly.epsilons),
        "HIGH": poly.xi > 0,
    }


def sigmoid(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Tensor | float,
    negative: Tensor | float,
    weight: Tensor | None,
    reduce: bool,
    compiled: bool,
    want_loss: bool = True,
    upstream: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As ``cpu.sigmoid``, in one launch; ``compiled`` has no meaning here."""
    logits = logits.contiguous()
    size, columns = logits.numel(), logits.shape[1]
    shape = (triton.cdiv(size, _BLOCK),) if reduce else logits.shape
    out = logits.new_empty(shape, dtype=torch.float32)
    gradient = None if upstream is None else torch.empty_like(logits)
    if size > 0:
        _sigmoid_kernel[(triton.cdiv(size, _BLOCK),)](
            logits,
            target,
            out if weight is None else weight.contiguous(),
            out if upstream is None else upstream.contiguous(),
            positive,
            negative,
            _epsilons(poly.epsilons, logits.device),
            out,
            out if gradient is None else gradient,
            float(poly.gamma),
            float(poly.xi),
            float(poly.gamma_hc),
            size,
            columns,
            WEIGHT=0 if weight is None else 1 + (weight.shape[1] > 1),
            POSITIVE_BY_CLASS=isinstance(positive, Tensor) and positive.dim() > 0,
            NEGATIVE_BY_CLASS=isinstance(negative, Tensor) and negative.dim() > 0,
            LOSS=want_loss,
            GRADIENT=gradient is not None,
            REDUCE=reduce,
            BLOCK=_BLOCK,
            **_branches(poly),
        )
    if not want_loss:
        return None, gradient
    return (out.sum() if reduce else out), gradient


def _run_softmax(
    out: Tensor,
    margin: Tensor,
    upstream: Tensor | None,
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
) -> None:
    rows, columns = logits.shape
    _softmax_kernel[(rows,)](
        logits,
        target,
        out if weight is None else weight.contiguous(),
        out if upstream is None else upstream.contiguous(),
        _epsilons(poly.epsilons, logits.device),
        margin,
        out,
        float(poly.gamma),
        float(poly.xi),
        float(poly.gamma_hc),
        columns,
        torch.finfo(torch.float32).min,
        WEIGHT=weight is not None,
        GRADIENT=upstream is not None,
        REDUCE=upstream is not None and upstream.dim() == 0,
        BLOCK=triton.next_power_of_2(columns),
        **_branches(poly),
    )


def softmax_loss(
    logits: Tensor, target: Tensor, poly: PolyFocal, weight: Tensor | None, reduce: bool
) -> tuple[Tensor, Tensor]:
    """As ``cpu.softmax_loss``."""
    loss, margin = logits.new_empty((2, len(logits)), dtype=torch.float32).unbind()
    if len(logits):
        _run_softmax(loss, margin, None, logits.contiguous(), target, poly, weight)
    return (loss.sum() if reduce else loss), margin


def softmax_gradient(
    upstream: Tensor,
    margin: Tensor,
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
) -> Tensor:
    """As ``cpu.softmax_gradient``; the margin is computed again, in registers."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if len(logits):
        _run_softmax(out, margin, upstream, logits.contiguous(), target, poly, weight)
    return out
