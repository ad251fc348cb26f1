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

import torch
from torch import Tensor

from polyfocal.ops.poly_focal import PolyFocal, at_class, compute_dtype, margin_loss, softplus

# Elements a thread in one block: 256 KB in float32, so that a block's three buffers fit its L2.
_BLOCK = 65_536
# From this many logits on, a pass saves more than the compiled code's call costs.
_COMPILE_FROM = 2**20
# Narrower rows than a vector register leave a compiled loop over them mostly idle.
_COMPILE_COLUMNS = 8
_LOG2_E = 1.4426950408889634
_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters

Scale = Tensor | float


def sigmoid_loss(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Scale,
    negative: Scale,
    weight: Tensor | None,
    reduce: bool,
    compiled: bool,
) -> Tensor:
    """The weighted binary losses or their sum; arguments as in ``ops.sigmoid_poly_focal``."""
    rows, columns = logits.shape
    sums = logits.new_empty(rows if reduce else 0, dtype=compute_dtype(logits))
    loss = logits.new_empty((0 if reduce else rows, columns), dtype=sums.dtype)
    by_entry = None if weight is None or (reduce and weight.shape[1] == 1) else weight
    if reduce and compiled and _is_worth_compiling(logits):
        if not _run_compiled("sums", poly, sums, logits.contiguous(), negative, by_entry):
            compiled = False
    else:
        compiled = False
    if not compiled:
        by_class, all_scale = _split(negative, 1.0) if reduce else (negative, 1.0)
        for part, buffers in _blocks(logits, 3):
            value = _negative_loss(logits[part], poly, *buffers)
            _scale(value, by_class, None if by_entry is None else by_entry[part])
            if reduce:
                torch.sum(value, dim=1, out=sums[part])
            else:
                loss[part] = value
        _scale(sums, all_scale)
    for index, labels in _foreground(logits, target):
        put, _ = margin_loss(poly, logits[index, labels].to(sums.dtype))
        put = put * at_class(positive, labels)
        if not reduce:
            loss[index, labels] = _scale(put, 1.0, _at(by_entry, index, labels))
            continue
        # Taken again without their positive entry, not corrected by a difference, which would
        # cancel where a confident positive is taken as a negative.
        rows_of = logits[index].to(sums.dtype)
        buffers = rows_of.new_empty((3, *rows_of.shape)).unbind()
        value = _scale(_negative_loss(rows_of, poly, *buffers), negative)
        value.scatter_(1, labels.unsqueeze(1), put.unsqueeze(1))
        sums[index] = _scale(value, 1.0, None if by_entry is None else by_entry[index]).sum(dim=1)
    if not reduce:
        return loss
    return sums.sum() if weight is by_entry else torch.dot(sums, weight.squeeze(1))  # type: ignore[union-attr]


def sigmoid_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Scale,
    negative: Scale,
    weight: Tensor | None,
    reduce: bool,
    compiled: bool,
) -> Tensor:
    """The gradient of the logits for the gradient ``upstream`` of what sigmoid_loss gave."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype)
    factor = upstream.item() if reduce else 1.0
    scales = [s for s in (weight, None if reduce else upstream) if s is not None]
    if not (
        reduce
        and compiled
        and _is_worth_compiling(logits)
        and _run_compiled("gradient", poly, gradient, logits.contiguous(), negative, weight, factor)
    ):
        half = gradient.dtype != compute_dtype(logits)
        by_class, all_scale = _split(negative, factor)
        for part, buffers in _blocks(logits, 4 if half else 3):
            into = buffers[3] if half else gradient[part]
            value = _negative_gradient(logits[part], poly, all_scale, into, *buffers[:3])
            _scale(value, by_class, *(s[part] for s in scales))
            if half:
                gradient[part] = value
    for index, labels in _foreground(logits, target):
        _, slope = margin_loss(poly, logits[index, labels].to(compute_dtype(logits)))
        slope = slope * at_class(positive, labels) * factor
        _scale(slope, 1.0, *(_at(s, index, labels) for s in scales))
        gradient[index, labels] = slope.to(gradient.dtype)
    return gradient


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


def _split(scale: Scale, factor: float) -> tuple[Scale, float]:
    """The product as a part for each class and a number."""
    return (scale, factor) if isinstance(scale, Tensor) else (1.0, scale * factor)


def _scale(value: Tensor, first: Scale, *others: Tensor | None) -> Tensor:
    """Multiplies in place by all that is there."""
    if isinstance(first, Tensor) or first != 1.0:
        value.mul_(first)
    for other in others:
        if other is not None:
            value.mul_(other)
    return value


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK * torch.get_num_threads() // max(logits.shape[1], 1))


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


def _power(q: Tensor, gamma: float, out: Tensor) -> Tensor:
    if gamma == 1:
        return q
    return torch.mul(q, q, out=out) if gamma == 2 else torch.pow(q, gamma, out=out)


def _series(coefficients: list[float], q: Tensor, onto: Tensor, buffer: Tensor) -> Tensor:
    """Adds sum_j c_j q^j, j from 1, in place."""
    if len(coefficients) == 1:
        return onto.add_(q, alpha=coefficients[0])
    buffer.fill_(0.0)
    for coefficient in reversed(coefficients):
        buffer.add_(coefficient).mul_(q)
    return onto.add_(buffer)


def _negative_loss(x: Tensor, poly: PolyFocal, q: Tensor, loss: Tensor, buffer: Tensor) -> Tensor:
    """L of the module's docstring, in ``loss``."""
    if x.dtype != loss.dtype:
        x = buffer.copy_(x)
    softplus(x, loss)
    if poly.gamma == 0 and not any(poly.epsilons):
        return loss
    torch.sigmoid(x, out=q)
    if any(poly.epsilons):
        _series(list(poly.epsilons), q, loss, buffer)
    return loss if poly.gamma == 0 else loss.mul_(_power(q, poly.gamma, buffer))


def _negative_gradient(
    x: Tensor,
    poly: PolyFocal,
    factor: float,
    gradient: Tensor,
    q: Tensor,
    inner: Tensor,
    buffer: Tensor,
) -> Tensor:
    """dl/dx of the module's docstring times ``factor``, in ``gradient``."""
    if x.dtype != q.dtype:
        x = buffer.copy_(x)
    torch.sigmoid(x, out=q)
    if poly.gamma == 0 and not any(poly.epsilons):
        return torch.mul(q, factor, out=gradient)
    if poly.gamma == 0:
        inner.fill_(0.0)
    else:
        softplus(x, inner).mul_(poly.gamma * factor)
    if any(poly.epsilons):
        slopes = [(poly.gamma + j) * e * factor for j, e in enumerate(poly.epsilons, start=1)]
        _series(slopes, q, inner, buffer)
    # factor q + (1 - q) inner
    torch.lerp(inner, q.new_tensor(factor), q, out=gradient)
    return gradient if poly.gamma == 0 else gradient.mul_(_power(q, poly.gamma, buffer))


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
    kind: str,
    poly: PolyFocal,
    out: Tensor,
    logits: Tensor,
    negative: Scale,
    weight: Tensor | None,
    factor: float | None = None,
) -> bool:
    """Runs the compiled pass into ``out``; False where it cannot be compiled."""
    if _broken:
        return False
    dtype = compute_dtype(logits)
    scale = torch.as_tensor(negative, dtype=dtype).expand(logits.shape[1]).contiguous()
    if factor is not None:
        scale = scale * factor
    power = int(poly.gamma) if poly.gamma in (0, 1, 2, 3, 4) else None
    coefficients = torch.tensor((poly.gamma, *poly.epsilons), dtype=dtype)
    kernel = _compiled(kind, power, len(poly.epsilons), weight is not None, str(logits.dtype))
    inputs = (
        (logits, scale, coefficients) if weight is None else (logits, scale, coefficients, weight)
    )
    try:
        with torch.no_grad():
            kernel(out, *inputs)
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
    kind: str, power: int | None, terms: int, weighted: bool, dtype: str
) -> Callable[..., None]:
    """The pass as one loop: into ``out``, from logits, scale a column, coefficients and weight.

    Everything in the key is a branch of the code; the rest are arguments.
    """

    def negatives(x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        x = x.to(coefficients.dtype)
        # exp2, since Inductor stores an exp or a logarithm that is used twice in memory.
        u = torch.exp2(x.abs() * -_LOG2_E)
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
            modulator = torch.exp2(coefficients[0] * _LOG2_E * log_q)
        else:
            modulator = torch.ones_like(q)
            for _ in range(power):
                modulator = modulator * q
        return q, ce, modulator, powers

    def sums(out: Tensor, x: Tensor, scale: Tensor, coefficients: Tensor, *weight: Tensor) -> None:
        _, ce, modulator, powers = negatives(x, coefficients)
        inner = ce
        for j, power_j in enumerate(powers[:terms], start=1):
            inner = inner + coefficients[j] * power_j
        loss = modulator * inner * scale
        for w in weight:
            loss = loss * w
        out.copy_(loss.sum(dim=1))

    def gradient(
        out: Tensor, x: Tensor, scale: Tensor, coefficients: Tensor, *weight: Tensor
    ) -> None:
        q, ce, modulator, powers = negatives(x, coefficients)
        gamma = coefficients[0]
        inner = gamma * ce
        for j, power_j in enumerate(powers[:terms], start=1):
            inner = inner + coefficients[j] * (gamma + j) * power_j
        slope = modulator * (q + (1.0 - q) * inner) * scale
        for w in weight:
            slope = slope * w
        out.copy_(slope)

    # All keys share the code of these functions, and by default a code is compiled 8 times at most.
    limit = {"recompile_limit": 64} if "recompile_limit" in _COMPILE_OPTIONS else {}
    function = sums if kind == "sums" else gradient
    return torch.compile(function, dynamic=True, fullgraph=True, **limit)  # type: ignore[call-overload]
