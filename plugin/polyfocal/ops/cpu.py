"""Losses and gradients in one pass over the logits, on a CPU.

The sigmoid form takes every entry as a negative, of which one formula in q = sigmoid(x) and
CE = softplus(x) gives the loss and the gradient, with s_j = epsilon_j:

    l = q^gamma (CE + sum_j s_j q^j)
    dl/dx = q^gamma (q + (1 - q) (gamma CE + sum_j s_j (gamma + j) q^j))

and then puts the few positives in their places. Two forms of that pass:

- *blocked* needs no compiler: a few in-place operations on blocks of rows that stay in cache, so
  that memory is read once and written once.
- *compiled* is one loop made by torch.compile, for large inputs where a C++ compiler is there. The
  shapes and the coefficients are arguments of it, so that it is compiled once for each gamma.

Both give the same result run after run. The softmax form is blocked: its pass is one exponential
an entry, and the rest happens on one number a row.
"""

import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from polyfocal.ops.poly_focal import PolyFocal, at_class, compute_dtype, margin_loss, softplus

# Elements a thread in one block: 256 KB in float32, so that a block's four buffers fit its L2.
_BLOCK = 65_536
# Elements below which torch leaves an operation to fewer threads.
_GRAIN = 32_768
# From this many logits on, a pass saves more than the compiled code's call costs.
_COMPILE_FROM = 2**20
# Narrower rows than a vector register leave a compiled loop over them mostly idle.
_COMPILE_COLUMNS = 8
_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters
# A product and a sum are one instruction, and nothing is put in memory that is cheaper to compute.
_COMPILE_OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_opcount_threshold": 10_000,
}

Scale = Tensor | float


def sigmoid(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Scale,
    negative: Scale,
    weight: Tensor | None,
    reduce: bool,
    compiled: bool,
    want_loss: bool = True,
    upstream: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The weighted binary losses and their gradient, each if it is asked for, in one pass.

    Args:
        logits, target, poly, positive, negative, weight, reduce: see ``ops.sigmoid_poly_focal``.
        compiled: use torch.compile where it is worth it.
        want_loss: compute the loss.
        upstream: the gradient of what comes out, to compute the gradient of the logits: a scalar
            with ``reduce``, else the logits' shape. None for no gradient.

    Returns:
        The losses (N, C) or their sum; the gradient of the logits.
    """
    rows, columns = logits.shape
    dtype = compute_dtype(logits)
    sums = logits.new_empty(rows if want_loss and reduce else 0, dtype=dtype)
    each = logits.new_empty((rows if want_loss and not reduce else 0, columns), dtype=dtype)
    gradient = None if upstream is None else torch.empty(logits.shape, dtype=logits.dtype)
    # A weight a row is applied to the sums of the rows, a weight an entry before they are taken.
    by_entry = None if weight is None or (reduce and weight.shape[1] == 1) else weight
    factor = upstream.item() if upstream is not None and reduce else 1.0
    scales = [s for s in (weight, None if reduce else upstream) if s is not None]

    done = False
    if reduce and compiled and _is_worth_compiling(logits):
        wanted = (sums if want_loss else None, gradient)
        done = _run_compiled(wanted, poly, logits.contiguous(), negative, weight, factor)
    if not done:
        by_class, number = (negative, 1.0) if isinstance(negative, Tensor) else (1.0, negative)
        half = logits.dtype != dtype
        for part, (q, ce, power, value) in _blocks(logits, 4):
            modulator = _terms(logits[part], poly, q, ce, power, want_loss)
            if want_loss:
                # The last use of ce may overwrite it.
                out = value if gradient is not None else ce
                _negative_loss(poly, q, ce, modulator, out)
                _scale(out, by_class, None if by_entry is None else by_entry[part])
                if reduce:
                    torch.sum(out, dim=1, out=sums[part])
                else:
                    torch.mul(out, number, out=each[part])
            if gradient is not None:
                out = value if half else gradient[part]
                _negative_gradient(poly, number * factor, q, ce, modulator, out)
                _scale(out, by_class, *(s[part] for s in scales))
                if half:
                    gradient[part] = out
        sums.mul_(number)

    for index, labels in _foreground(logits, target):
        put, slope = margin_loss(poly, logits[index, labels].to(dtype))
        at_positive = at_class(positive, labels)
        if gradient is not None:
            slope = slope * at_positive * factor
            _scale(slope, 1.0, *(_at(s, index, labels) for s in scales))
            gradient[index, labels] = slope.to(gradient.dtype)
        if want_loss and reduce:
            sums[index] = _row_sums(
                logits[index].to(dtype),
                labels,
                put * at_positive,
                poly,
                negative,
                None if by_entry is None else by_entry[index],
            )
        elif want_loss:
            each[index, labels] = _scale(put * at_positive, 1.0, _at(by_entry, index, labels))
    if not want_loss:
        return None, gradient
    if not reduce:
        return each, gradient
    if weight is None or by_entry is not None:
        return sums.sum(), gradient
    # Not a dot product, which BLAS adds up one by one: in float32 that loses a thousandth of the
    # loss of a million anchors.
    return sums.mul_(weight.squeeze(1)).sum(), gradient


def _row_sums(
    x: Tensor, labels: Tensor, put: Tensor, poly: PolyFocal, negative: Scale, weight: Tensor | None
) -> Tensor:
    """The sums of rows with a positive entry each, of which ``put`` is the loss.

    They are taken again and not corrected by a difference, which would cancel where a confident
    positive was taken as a negative.
    """
    q, ce, power = x.new_empty((3, *x.shape)).unbind()
    _negative_loss(poly, q, ce, _terms(x, poly, q, ce, power, True), ce)
    _scale(ce, negative).scatter_(1, labels.unsqueeze(1), put.unsqueeze(1))
    return _scale(ce, 1.0, weight).sum(dim=1)


def softmax_loss(
    logits: Tensor, target: Tensor, poly: PolyFocal, weight: Tensor | None, reduce: bool
) -> tuple[Tensor, Tensor]:
    """The weighted losses of the rows or their sum, and the margins z of the rows, (N,)."""
    margin = logits.new_empty(len(logits), dtype=compute_dtype(logits))
    for part, (others, log_share) in _blocks(logits, 2):
        column = target[part].unsqueeze(1)
        _without_label(logits[part], column, others)
        torch.log_softmax(others, dim=1, out=log_share)
        # The greatest of them, x_k - rest, gives rest without rounding away what matters.
        rest = others.amax(dim=1) - log_share.amax(dim=1)
        torch.sub(logits[part].gather(1, column).squeeze(1), rest, out=margin[part])
    loss, _ = margin_loss(poly, margin)
    if weight is not None:
        loss = loss * weight
    return (loss.sum() if reduce else loss), margin


def softmax_gradient(
    upstream: Tensor,
    margin: Tensor,
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
) -> Tensor:
    """The gradient of the logits: D for the label, -D softmax(the others) for the others.

    D is the derivative by the margin, times weight and ``upstream``.
    """
    _, slope = margin_loss(poly, margin)
    slope = (slope * upstream if weight is None else slope * upstream * weight).unsqueeze(1)
    gradient = torch.empty(logits.shape, dtype=logits.dtype)
    half = gradient.dtype != margin.dtype
    for part, buffers in _blocks(logits, 2 if half else 1):
        column = target[part].unsqueeze(1)
        _without_label(logits[part], column, buffers[0])
        value = buffers[1] if half else gradient[part]
        torch.softmax(buffers[0], dim=1, out=value)
        value.mul_(-slope[part]).scatter_(1, column, slope[part])
        if half:
            gradient[part] = value
    return gradient


def _without_label(logits: Tensor, column: Tensor, out: Tensor) -> None:
    # The lowest finite number, not -inf: a single column then still has a softmax.
    out.copy_(logits).scatter_(1, column, torch.finfo(out.dtype).min)


def _at(scale: Tensor | None, index: Tensor, labels: Tensor) -> Tensor | None:
    if scale is None:
        return None
    return scale[index, 0] if scale.shape[1] == 1 else scale[index, labels]


def _scale(value: Tensor, first: Scale, *others: Tensor | None) -> Tensor:
    """Multiplies in place by all that is there."""
    if isinstance(first, Tensor) or first != 1.0:
        value.mul_(first)
    for other in others:
        if other is not None:
            value.mul_(other)
    return value


def _block_rows(logits: Tensor) -> int:
    """Rows of a block: four buffers of its size add a sixth to the logits where they can."""
    threads = torch.get_num_threads()
    elements = _BLOCK * threads
    if logits.numel() > elements:
        elements = min(elements, max(_GRAIN * threads, logits.numel() // 24))
    return max(1, elements // max(logits.shape[1], 1))


def _blocks(logits: Tensor, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows, each with ``count`` buffers of its shape, the same memory for all."""
    step = min(_block_rows(logits), len(logits))
    memory = logits.new_empty((count, step, logits.shape[1]), dtype=compute_dtype(logits))
    for start in range(0, len(logits), max(step, 1)):
        part = slice(start, min(start + step, len(logits)))
        yield part, [buffer[: part.stop - start] for buffer in memory.unbind()]


def _foreground(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and labels of the rows with a label that is not background, some rows at a time."""
    for index in (target < logits.shape[1]).nonzero().squeeze(1).split(_block_rows(logits)):
        if len(index):
            yield index, target[index]


def _terms(
    x: Tensor, poly: PolyFocal, q: Tensor, ce: Tensor, power: Tensor, want_loss: bool
) -> Tensor | None:
    """Fills q = sigmoid(x) and CE where they are needed; returns q^gamma, None for 1."""
    if x.dtype != q.dtype:
        x = power.copy_(x)
    torch.sigmoid(x, out=q)
    if want_loss or poly.gamma > 0:
        softplus(x, ce)
    if poly.gamma == 0:
        return None
    if poly.gamma == 1:
        return q
    return torch.mul(q, q, out=power) if poly.gamma == 2 else torch.pow(q, poly.gamma, out=power)


def _series(coefficients: list[float], q: Tensor, onto: Tensor) -> None:
    """Adds sum_j c_j q^j, j from 1, in place."""
    if len(coefficients) == 1:
        onto.add_(q, alpha=coefficients[0])
    elif coefficients:
        total = torch.zeros_like(q)
        for coefficient in reversed(coefficients):
            total.add_(coefficient).mul_(q)
        onto.add_(total)


def _negative_loss(
    poly: PolyFocal, q: Tensor, ce: Tensor, modulator: Tensor | None, out: Tensor
) -> None:
    """The loss of the module's docstring."""
    if out is not ce:
        out.copy_(ce)
    if any(poly.epsilons):
        _series(list(poly.epsilons), q, out)
    if modulator is not None:
        out.mul_(modulator)


def _negative_gradient(
    poly: PolyFocal, factor: float, q: Tensor, ce: Tensor, modulator: Tensor | None, out: Tensor
) -> None:
    """The gradient of the module's docstring times ``factor``; overwrites ``ce``."""
    if poly.gamma > 0:
        ce.mul_(poly.gamma * factor)
    else:
        ce.zero_()
    if any(poly.epsilons):
        _series([(poly.gamma + j) * e * factor for j, e in enumerate(poly.epsilons, 1)], q, ce)
    # factor q + (1 - q) ce
    torch.lerp(ce, q.new_tensor(factor), q, out=out)
    if modulator is not None:
        out.mul_(modulator)


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile can make CPU code here: a C++ compiler is on the path."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return any(name and shutil.which(name) for name in names)


def _is_worth_compiling(logits: Tensor) -> bool:
    # In float64 the compiled series of the logarithm would not be exact.
    return (
        logits.numel() >= _COMPILE_FROM
        and logits.shape[1] >= _COMPILE_COLUMNS
        and logits.dtype != torch.float64
        and has_compiler()
    )


_broken: list[str] = []


def _run_compiled(
    out: tuple[Tensor | None, Tensor | None],
    poly: PolyFocal,
    logits: Tensor,
    negative: Scale,
    weight: Tensor | None,
    factor: float,
) -> bool:
    """Runs the compiled pass into the sums and the gradient; False where it cannot be compiled.

    The gradient is multiplied by ``factor``; a weight a row is left to the caller in the sums.
    """
    if _broken:
        return False
    dtype = compute_dtype(logits)
    scale = torch.as_tensor(negative, dtype=dtype).expand(logits.shape[1]).contiguous()
    power = int(poly.gamma) if poly.gamma in (0, 1, 2, 3, 4) else None
    slopes = ((poly.gamma + j) * e for j, e in enumerate(poly.epsilons, start=1))
    coefficients = torch.tensor((poly.gamma, *poly.epsilons, *slopes), dtype=dtype)
    by_row = weight is not None and weight.shape[1] == 1
    if out[1] is None and by_row:
        weight = None
    wanted = (out[0] is not None, out[1] is not None)
    weighted = None if weight is None else "row" if by_row else "entry"
    kernel = _compiled(wanted, power, len(poly.epsilons), weighted, str(logits.dtype))
    tensors = (*out, logits, scale, scale * factor, coefficients, weight)
    try:
        with torch.no_grad():
            kernel(*(tensor for tensor in tensors if tensor is not None))
    except Exception as error:
        _broken.append(str(error))
        warnings.warn(
            "torch.compile failed, so that polyfocal's losses take their path without a compiler:"
            f" {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _compiled(
    wanted: tuple[bool, bool], power: int | None, terms: int, weighted: str | None, dtype: str
) -> Callable[..., None]:
    """The pass as one loop: into the sums of the rows, the gradient, or both, as ``wanted``.

    It takes these, the logits, a scale a column of the loss and of the gradient, the coefficients
    and, ``weighted`` by row or entry, the weight. Everything in the key is a branch of the code;
    the rest are arguments.
    """

    def negatives(x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        x = x.to(coefficients.dtype)
        # exp2, since Inductor stores an exp or a logarithm that is used twice in memory. The
        # numbers are literals, log2(e): a global's would be an argument of the loop.
        u = torch.exp2(x.abs() * -1.4426950408889634)
        # log1p(u) = 2 artanh(s), s = u / (2 + u) <= 1/3, by its series, exact in float32; one
        # division serves s and q.
        both = 1.0 / ((1.0 + u) * (2.0 + u))
        s = u * (1.0 + u) * both
        series = torch.full_like(s, 1 / 15)
        for odd in (13, 11, 9, 7, 5, 3, 1):
            series = series * (s * s) + 1 / odd
        log1p = 2.0 * s * series
        r = (2.0 + u) * both
        q = torch.where(x >= 0, r, u * r)
        ce = torch.relu(x) + log1p
        powers = [q]
        for _ in range(terms - 1):
            powers.append(powers[-1] * q)
        if power is None:
            log_q = torch.clamp_max(x, 0.0) - log1p
            modulator = torch.exp2(coefficients[0] * 1.4426950408889634 * log_q)
        else:
            modulator = torch.ones_like(q)
            for _ in range(power):
                modulator = modulator * q
        return q, ce, modulator, powers

    def run(*tensors: Tensor) -> None:
        out, (x, scale, slope_scale, coefficients, *weight) = tensors[:outputs], tensors[outputs:]
        q, ce, modulator, powers = negatives(x, coefficients)
        if wanted[0]:
            inner = ce
            for j in range(terms):
                inner = inner + coefficients[1 + j] * powers[j]
            loss = modulator * inner * scale
            if weighted == "entry":
                loss = loss * weight[0]
            out[0].copy_(loss.sum(dim=1))
        if wanted[1]:
            inner = coefficients[0] * ce
            for j in range(terms):
                inner = inner + coefficients[1 + terms + j] * powers[j]
            slope = modulator * (q + (1.0 - q) * inner) * slope_scale
            if weighted:
                slope = slope * weight[0]
            out[-1].copy_(slope)

    outputs = sum(wanted)
    settings: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": _known_options()}
    # All keys share the code of these functions, and by default a code is compiled 8 times at most.
    if "recompile_limit" in _COMPILE_ARGUMENTS:
        settings["recompile_limit"] = 64
    return torch.compile(run, **settings)


def _known_options() -> dict[str, Any]:
    """The options of the compiler that this torch has."""
    known = torch._inductor.list_options()
    return {name: value for name, value in _COMPILE_OPTIONS.items() if name in known}
