"""Losses and gradients in one pass over the logits, on a GPU, by Triton.

Each kernel reads the logits once, computes in float32 and writes only what is asked for: the
gradient, or one partial sum per tile. One program adds the partial sums afterwards in a fixed
order. No kernel waits for the device or adds atomically.

A program has a tile of rows and walks over their columns. So the label and weight of a row are read
once, and no index has to be divided into row and column. The shape alone decides the size of a
tile: Triton's autotuner would wait for the device in the first step, which a captured graph does
not allow. ``benchmarks/gpu_check.py --parts tiles`` measures the choices.

A label out of range makes the loss of its row NaN, and with it the sum: a look at the labels
beforehand would wait for the device in every step.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyfocal.ops.poly_focal import PolyFocal

ENTRIES = 1024
"""Entries of a tile; a power of 2."""
WARPS = 4
"""Warps of a program."""
_STRIP = 4096  # columns of a program, where there are more
_LARGE = 2**31  # from this many entries on, their numbers need 64 bits


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
    rest = tl.where(w == 1.0, 1.0, w - 1.0)
    both = 1.0 / (w * rest)  # one division for 1 / w and 1 / rest
    # log1p(u), exact to rounding.
    log1p = tl.where(w == 1.0, u, tl.log(w) * u * (both * w))
    larger = both * rest
    smaller = u * larger
    p = tl.where(z >= 0, larger, smaller)
    q = tl.where(z >= 0, smaller, larger)
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
def _rows(ROWS: tl.constexpr, LARGE: tl.constexpr):
    """The rows of a program's tile; with 64 bits where the entries need them."""
    tile = tl.program_id(0)
    if LARGE:
        tile = tile.to(tl.int64)
    return tile * ROWS + tl.arange(0, ROWS)


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
    rows,
    columns,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
    WEIGHT: tl.constexpr,  # 0 none, 1 per row, 2 per entry
    POSITIVE_BY_CLASS: tl.constexpr,
    NEGATIVE_BY_CLASS: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr,
    LARGE: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = _rows(ROWS, LARGE)
    in_rows = row < rows
    label = tl.load(target + row, mask=in_rows, other=0)
    of_row = tl.where((label < 0) | (label > columns), float("nan"), 1.0)
    if WEIGHT == 1:
        of_row *= tl.load(weight + row, mask=in_rows, other=0.0)
    first = row * columns
    total = tl.full((ROWS,), 0.0, tl.float32)
    start = tl.program_id(1) * STRIP
    for begin in range(start, tl.minimum(start + STRIP, columns), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        in_columns = column < columns
        entry = first[:, None] + column[None, :]
        mask = in_rows[:, None] & in_columns[None, :]
        x = tl.load(logits + entry, mask=mask, other=0.0).to(tl.float32)
        is_positive = label[:, None] == column[None, :]
        z = tl.where(is_positive, x, -x)
        loss, slope = _margin(
            z, tl.where(is_positive, xi, 0.0), gamma, gamma_hc, epsilons, POWER, TERMS, HIGH
        )
        if POSITIVE_BY_CLASS:
            of_positive = tl.load(positive + column, mask=in_columns, other=0.0)[None, :]
        else:
            of_positive = positive
        if NEGATIVE_BY_CLASS:
            of_negative = tl.load(negative + column, mask=in_columns, other=0.0)[None, :]
        else:
            of_negative = negative
        scale = tl.where(is_positive, of_positive, of_negative) * of_row[:, None]
        if WEIGHT == 2:
            scale *= tl.load(weight + entry, mask=mask, other=0.0)
        if LOSS:
            if REDUCE:
                total += tl.sum(tl.where(mask, loss * scale, 0.0), axis=1)
            else:
                tl.store(out + entry, loss * scale, mask=mask)
        if GRADIENT:
            if REDUCE:
                scale *= tl.load(upstream)
            else:
                scale *= tl.load(upstream + entry, mask=mask, other=0.0)
            value = tl.where(is_positive, slope, -slope) * scale
            tl.store(gradient + entry, value.to(gradient.dtype.element_ty), mask=mask)
    if LOSS and REDUCE:
        place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(out + place, tl.sum(total, axis=0))


@triton.jit
def _softmax_loss_kernel(
    logits,
    target,
    weight,
    epsilons,
    rest_of,
    out,
    gamma,
    xi,
    gamma_hc,
    rows,
    columns,
    lowest,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
    WEIGHT: tl.constexpr,
    REDUCE: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = _rows(ROWS, LARGE)
    in_rows = row < rows
    label = tl.load(target + row, mask=in_rows, other=0)
    right = (label >= 0) & (label < columns)
    first = row * columns
    # The logarithm of the sum of the others' exponentials, from one pass.
    highest = tl.full((ROWS,), 0.0, tl.float32) + lowest
    total = tl.full((ROWS,), 0.0, tl.float32)
    at_label = tl.full((ROWS,), 0.0, tl.float32)
    for begin in range(0, columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (column < columns)[None, :]
        x = tl.load(logits + (first[:, None] + column[None, :]), mask=mask, other=0.0)
        x = x.to(tl.float32)
        is_label = label[:, None] == column[None, :]
        at_label += tl.sum(tl.where(is_label, x, 0.0), axis=1)
        x = tl.where(is_label | (column >= columns)[None, :], lowest, x)
        higher = tl.maximum(highest, tl.max(x, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        highest = higher
    rest = highest + tl.log(total)
    loss, _ = _margin(at_label - rest, xi, gamma, gamma_hc, epsilons, POWER, TERMS, HIGH)
    loss = tl.where(right, loss, float("nan"))
    if WEIGHT:
        loss *= tl.load(weight + row, mask=in_rows, other=0.0)
    tl.store(rest_of + row, rest, mask=in_rows)
    if REDUCE:
        tl.store(out + tl.program_id(0), tl.sum(tl.where(in_rows, loss, 0.0), axis=0))
    else:
        tl.store(out + row, loss, mask=in_rows)


@triton.jit
def _softmax_gradient_kernel(
    logits,
    target,
    weight,
    upstream,
    epsilons,
    rest_of,
    gradient,
    gamma,
    xi,
    gamma_hc,
    rows,
    columns,
    POWER: tl.constexpr,
    TERMS: tl.constexpr,
    HIGH: tl.constexpr,
    WEIGHT: tl.constexpr,
    REDUCE: tl.constexpr,
    LARGE: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = _rows(ROWS, LARGE)
    in_rows = row < rows
    label = tl.load(target + row, mask=in_rows, other=0)
    right = in_rows & (label >= 0) & (label < columns)
    first = row * columns
    at_label = tl.load(logits + (first + label), mask=right, other=0.0).to(tl.float32)
    rest = tl.load(rest_of + row, mask=in_rows, other=0.0)
    _, slope = _margin(at_label - rest, xi, gamma, gamma_hc, epsilons, POWER, TERMS, HIGH)
    slope = tl.where(right, slope, float("nan"))
    if WEIGHT:
        slope *= tl.load(weight + row, mask=in_rows, other=0.0)
    if REDUCE:
        slope *= tl.load(upstream)
    else:
        slope *= tl.load(upstream + row, mask=in_rows, other=0.0)
    start = tl.program_id(1) * STRIP
    for begin in range(start, tl.minimum(start + STRIP, columns), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (column < columns)[None, :]
        entry = first[:, None] + column[None, :]
        x = tl.load(logits + entry, mask=mask, other=0.0).to(tl.float32)
        of_others = -tl.exp(tl.minimum(x - rest[:, None], 0.0))  # which the others are below
        value = slope[:, None] * tl.where(label[:, None] == column[None, :], 1.0, of_others)
        tl.store(gradient + entry, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _total_kernel(parts, out, count, BLOCK: tl.constexpr):
    """The sum of the parts, always in the same order."""
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(parts + place, mask=place < count, other=0.0)
    tl.store(out, tl.sum(total, axis=0))


def _tile(columns: int) -> dict[str, int]:
    """Rows and columns of a tile: wide, but with few columns beside those of the logits."""
    width = triton.next_power_of_2(columns)
    if width > 16:
        widths = (1024, 512, 256, 128, 64, 32)
        width = next((w for w in widths if triton.cdiv(columns, w) * w <= 1.125 * columns), 16)
    width = min(width, ENTRIES)
    return {"ROWS": ENTRIES // width, "COLUMNS": width}


def _total(parts: Tensor) -> Tensor:
    """A scalar."""
    out = parts.new_empty(())
    _total_kernel[(1,)](parts, out, parts.numel(), BLOCK=1024)
    return out


@functools.lru_cache(maxsize=64)
def _epsilons(epsilons: tuple[float, ...], device: torch.device) -> Tensor:
    # Filled on the device: a copy of a list would wait for it.
    return torch.cat([torch.full((1,), float(e), device=device) for e in epsilons or (0.0,)])


def _branches(poly: PolyFocal) -> dict[str, int | bool]:
    """Which branches of the code the coefficients choose."""
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
    """As ``cpu.sigmoid``, in one launch each way; ``compiled`` has no meaning here."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    gradient = None if upstream is None else torch.empty_like(logits)
    if logits.numel() == 0:
        nothing = logits.new_zeros(() if reduce else logits.shape, dtype=torch.float32)
        return (nothing if want_loss else None), gradient
    tile = _tile(columns)
    grid = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, _STRIP)
    shape = (grid[0] * grid[1],) if reduce else logits.shape
    out = logits.new_empty(shape if want_loss else (1,), dtype=torch.float32)
    _sigmoid_kernel[grid](
        logits,
        target.contiguous(),
        out if weight is None else weight.contiguous(),
        out if upstream is None else upstream.contiguous(),
        positive.contiguous() if isinstance(positive, Tensor) else positive,
        negative.contiguous() if isinstance(negative, Tensor) else negative,
        _epsilons(poly.epsilons, logits.device),
        out,
        out if gradient is None else gradient,
        float(poly.gamma),
        float(poly.xi),
        float(poly.gamma_hc),
        rows,
        columns,
        WEIGHT=0 if weight is None else 1 + (weight.shape[1] > 1),
        POSITIVE_BY_CLASS=isinstance(positive, Tensor) and positive.dim() > 0,
        NEGATIVE_BY_CLASS=isinstance(negative, Tensor) and negative.dim() > 0,
        LOSS=want_loss,
        GRADIENT=gradient is not None,
        REDUCE=reduce,
        STRIP=_STRIP,
        LARGE=logits.numel() >= _LARGE,
        num_warps=WARPS,
        **tile,
        **_branches(poly),
    )
    if not want_loss:
        return None, gradient
    return (_total(out) if reduce else out), gradient


def softmax_loss(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
    reduce: bool,
    want_gradient: bool = True,
) -> tuple[Tensor, tuple[Tensor]]:
    """As ``cpu.softmax_loss``; it keeps log sum_k e^(x_k) of the others."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    rest = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return rest.sum() if reduce else rest, (rest,)
    tile = _tile(columns)
    grid = (triton.cdiv(rows, tile["ROWS"]),)
    out = logits.new_empty(grid if reduce else (rows,), dtype=torch.float32)
    _softmax_loss_kernel[grid](
        logits,
        target.contiguous(),
        out if weight is None else weight.contiguous(),
        _epsilons(poly.epsilons, logits.device),
        rest,
        out,
        float(poly.gamma),
        float(poly.xi),
        float(poly.gamma_hc),
        rows,
        columns,
        # The lowest number, not -inf: a single column then still has a finite gradient.
        torch.finfo(torch.float32).min,
        WEIGHT=weight is not None,
        REDUCE=reduce,
        LARGE=logits.numel() >= _LARGE,
        num_warps=WARPS,
        **tile,
        **_branches(poly),
    )
    return (_total(out) if reduce else out), (rest,)


def softmax_gradient(
    upstream: Tensor,
    kept: Sequence[Tensor],
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """As ``cpu.softmax_gradient``, from what :func:`softmax_loss` returned."""
    if isinstance(scale, Tensor) or scale != 1.0:
        upstream = upstream * scale
    logits = logits.contiguous()
    rows, columns = logits.shape
    gradient = torch.empty_like(logits)
    if rows == 0:
        return gradient
    tile = _tile(columns)
    _softmax_gradient_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, _STRIP))](
        logits,
        target.contiguous(),
        gradient if weight is None else weight.contiguous(),
        upstream.contiguous(),
        _epsilons(poly.epsilons, logits.device),
        *kept,
        gradient,
        float(poly.gamma),
        float(poly.xi),
        float(poly.gamma_hc),
        rows,
        columns,
        WEIGHT=weight is not None,
        REDUCE=upstream.dim() == 0,
        LARGE=logits.numel() >= _LARGE,
        STRIP=_STRIP,
        num_warps=WARPS,
        **tile,
        **_branches(poly),
    )
    return gradient
