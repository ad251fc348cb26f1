"""Losses and gradients in one pass over the logits, on a CPU.

The sigmoid form computes every entry as a negative, z = -x, and then puts the few positives in
their places. The formula is that of ``poly_focal``. The pass has two forms:

- *blocked* needs no compiler: a few operations on blocks of rows that stay in cache, so that memory
  is read once and written once.
- *compiled* is one loop made by torch.compile, for large inputs if there is a C++ compiler. The
  shapes and the coefficients are arguments of the loop, so that it is compiled once per gamma.

Both give the same result run after run. The softmax form is blocked: its pass is torch's softmax,
and the rest happens on one number per row.
"""

import functools
import inspect
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from polyfocal.ops.poly_focal import (
    PolyFocal,
    at_class,
    compute_dtype,
    loss_of,
    margin_loss,
    rate_of,
    slope_of,
    softplus,
)

# Elements per thread in a block: 256 KB in float32, so that the block's four buffers fit its L2.
_BLOCK = 65_536
# Elements below which torch leaves an operation to fewer threads.
_GRAIN = 32_768
# From this many logits on, a pass saves more than the compiled code's call costs.
_COMPILE_FROM = 2**20
# Up to this many logits the softmax form keeps the softmax for backward, and the sigmoid form the
# gradient; more are not worth the memory.
_KEEP = 2**20
# Narrower rows than a vector register leave a compiled loop over them mostly idle.
_COMPILE_COLUMNS = 8
_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters
# A product and a sum become one instruction; nothing that is cheaper to compute goes to memory.
_CONTRACT = "enable_floating_point_contract_flag"
_COMPILE_OPTIONS = {
    f"cpp.{_CONTRACT}": "fast",
    "realize_opcount_threshold": 10_000,
}

Scale = Tensor | float


def is_small(logits: Tensor) -> bool:
    """Whether the sum of the sigmoid form's losses is worth computing together with its gradient.

    The gradient is kept in the dtype of the logits. In half precision it would lose what a gradient
    scaler keeps, because the scaler's factor comes later.
    """
    return logits.numel() <= _KEEP and logits.dtype == compute_dtype(logits)


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
        upstream: the gradient of the result, from which that of the logits is computed: a scalar
            with ``reduce``, else the logits' shape. None for no gradient.

    Returns:
        The losses (N, C) or their sum; the gradient of the logits.
    """
    rows, columns = logits.shape
    dtype = compute_dtype(logits)
    sums = logits.new_empty(rows if want_loss and reduce else 0, dtype=dtype)
    each = logits.new_empty((rows if want_loss and not reduce else 0, columns), dtype=dtype)
    gradient = None if upstream is None else torch.empty(logits.shape, dtype=logits.dtype)
    # A weight per row is applied to the sums of the rows, a weight per entry before the sums.
    by_entry = None if weight is None or (reduce and weight.shape[1] == 1) else weight
    factor = upstream.item() if upstream is not None and reduce else 1.0
    scales = [s for s in (weight, None if reduce else upstream) if s is not None]

    done = False
    if reduce and compiled and _is_worth_compiling(logits):
        wanted = (sums if want_loss else None, gradient)
        done = _run_compiled(wanted, poly, logits.contiguous(), negative, weight, factor)
    whole = None  # the losses of the entries before their sums are taken, where they are one block
    if not done:
        as_negatives = PolyFocal(poly.gamma, poly.epsilons)
        by_class, number = (negative, 1.0) if isinstance(negative, Tensor) else (1.0, negative)
        at_once = reduce and _block_rows(logits) >= rows
        for part in _blocks(logits):
            q, ce, power = _terms(as_negatives, logits[part].to(dtype), want_loss)
            if want_loss:
                # If the loss is CE itself, the slope does not need it.
                loss = _scale(loss_of(as_negatives, ce, q, power), by_class)
                if at_once:
                    whole = _scale(loss, number)
                else:
                    _scale(loss, None if by_entry is None else by_entry[part])
                    if reduce:
                        torch.sum(loss, dim=1, out=sums[part])
                    else:
                        torch.mul(loss, number, out=each[part])
            if gradient is not None:
                out = gradient[part] if gradient.dtype == dtype else None
                slope = slope_of(as_negatives, ce, q, power, factor=number * factor, out=out)
                _scale(slope, by_class, *(s[part] for s in scales))
                if slope is not out:
                    gradient[part] = slope
        if not at_once:
            sums.mul_(number)

    for index, labels in _foreground(logits, target):
        put, slope = margin_loss(poly, logits[index, labels].to(dtype))
        at_positive = at_class(positive, labels)
        if gradient is not None:
            slope = slope * at_positive * factor
            _scale(slope, *(_at(s, index, labels) for s in scales))
            gradient[index, labels] = slope.to(gradient.dtype)
        if want_loss and whole is not None:
            whole[index, labels] = put * at_positive
        elif want_loss and reduce:
            sums[index] = _row_sums(
                logits[index].to(dtype),
                labels,
                put * at_positive,
                poly,
                negative,
                None if by_entry is None else by_entry[index],
            )
        elif want_loss:
            each[index, labels] = _scale(put * at_positive, _at(by_entry, index, labels))
    if whole is not None:
        sums = _scale(whole, by_entry).sum(dim=1)
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

    The rows are summed again. A correction by a difference would cancel digits for a confident
    positive that was computed as a negative.
    """
    as_negatives = PolyFocal(poly.gamma, poly.epsilons)
    q, ce, power = _terms(as_negatives, x, True)
    each = _scale(loss_of(as_negatives, ce, q, power), negative)
    each.scatter_(1, labels.unsqueeze(1), put.unsqueeze(1))
    return _scale(each, weight).sum(dim=1)


def softmax_loss(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
    reduce: bool,
    want_gradient: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weighted losses of the rows or their sum, and what the gradient is made of.

    With P the softmax, the label's p = P_y and q = 1 - p, added up from the others so that it is
    exact next to 0: CE = log1p(q / p), and the gradient is rate P_k for the others and -rate q for
    the label.

    Returns:
        (N,) or a scalar; the weighted rates (N, 1) and P with -q for the label, of more than
        ``_KEEP`` logits only -q (N, 1). Nothing if no gradient is wanted.
    """
    dtype = compute_dtype(logits)
    column = target.unsqueeze(1)
    if logits.numel() <= _KEEP:
        share, p, q = _shares(logits, column, dtype)
    else:
        share = None
        parts = [_shares(logits[part], column[part], dtype)[1:] for part in _blocks(logits)]
        p, q = (torch.cat(of) for of in zip(*parts, strict=True))
    ce = (q / p).log1p_()
    by_row = None if weight is None else weight.unsqueeze(1)
    each, total = _weighed_loss(poly, ce, q, p, by_row)
    # Where p is rounded to 0 or soon would be, q / p is infinite, and log p is not.
    if not math.isfinite(total.item()):
        far = p.squeeze(1) < torch.finfo(dtype).tiny
        x, labels = logits[far].to(dtype), column[far]
        ce[far] = torch.logsumexp(x, dim=1, keepdim=True) - x.gather(1, labels)
        each, total = _weighed_loss(poly, ce, q, p, by_row)
    loss = total if reduce else each.squeeze(1)
    if not want_gradient:
        return loss, ()
    rate = rate_of(poly, ce, q, p)
    if by_row is not None:
        rate = rate * by_row
    at_label = q.neg()
    return loss, (rate, at_label if share is None else share.scatter_(1, column, at_label))


def _weighed_loss(
    poly: PolyFocal, ce: Tensor, q: Tensor, p: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The losses of rows (N, 1) and their sum."""
    loss = loss_of(poly, ce, q, q.pow(poly.gamma) if poly.gamma > 0 else None, p)
    if weight is not None:
        loss = loss * weight
    return loss, loss.sum()


def _shares(logits: Tensor, column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of some rows with 0 for the label, and the label's p and q (N, 1)."""
    share = torch.softmax(logits, dim=1, dtype=dtype)
    p = share.gather(1, column)
    return share, p, share.scatter_(1, column, 0.0).sum(dim=1, keepdim=True)


def softmax_gradient(
    upstream: Tensor,
    kept: Sequence[Tensor],
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
    scale: Scale = 1.0,
) -> Tensor:
    """The gradient of the logits times ``scale``, of what :func:`softmax_loss` kept.

    ``upstream`` is (N,), or a scalar with ``reduce``.
    """
    rate, share = kept
    rate = rate * (upstream.unsqueeze(1) if upstream.dim() else upstream.item() * scale)
    if share.shape == logits.shape:
        gradient = share * rate
        return gradient if gradient.dtype == logits.dtype else gradient.to(logits.dtype)
    at_label, column = share, target.unsqueeze(1)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in _blocks(logits):
        if gradient.dtype == rate.dtype:
            value = torch.softmax(logits[part], dim=1, out=gradient[part])
        else:
            value = torch.softmax(logits[part], dim=1, dtype=rate.dtype)
        value.scatter_(1, column[part], at_label[part]).mul_(rate[part])
        if value.dtype != gradient.dtype:
            gradient[part] = value
    return gradient


def _at(scale: Tensor | None, index: Tensor, labels: Tensor) -> Tensor | None:
    if scale is None:
        return None
    return scale[index, 0] if scale.shape[1] == 1 else scale[index, labels]


def _scale(value: Tensor, *factors: Scale | None) -> Tensor:
    """Multiplies in place by every factor that is neither None nor 1."""
    for factor in factors:
        if isinstance(factor, Tensor) or factor not in (None, 1.0):
            value.mul_(factor)
    return value


def _block_rows(logits: Tensor) -> int:
    """Rows of a block: if possible, its four buffers add a sixth to the memory of the logits."""
    threads = torch.get_num_threads()
    elements = 2 * _BLOCK * threads  # a little more than fits is not worth a second block
    if logits.numel() > elements:
        elements = _BLOCK * threads
        elements = min(elements, max(_GRAIN * threads, logits.numel() // 24))
    return max(1, elements // max(logits.shape[1], 1))


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, each small enough to stay in cache."""
    step = _block_rows(logits)
    if step >= len(logits):
        yield slice(None)
        return
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _foreground(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and labels of the rows with a label that is not background, some rows at a time."""
    for index in (target < logits.shape[1]).nonzero().squeeze(1).split(_block_rows(logits)):
        if len(index):
            yield index, target[index]


def _terms(poly: PolyFocal, x: Tensor, want_loss: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, CE and q^gamma of negatives with the logits x; CE is only q if nothing needs it."""
    q = torch.sigmoid(x)
    ce = softplus(x) if want_loss or poly.gamma > 0 else q
    if poly.gamma == 0:
        return q, ce, None
    if poly.gamma == 1:
        return q, ce, q
    return q, ce, q * q if poly.gamma == 2 else q.pow(poly.gamma)


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
    """Runs the compiled pass into the sums and the gradient; False if it cannot be compiled.

    The gradient is multiplied by ``factor``; in the sums a weight per row is left to the caller.
    """
    if _broken:
        return False
    dtype = compute_dtype(logits)
    scale = torch.as_tensor(negative, dtype=dtype).expand(logits.shape[1]).contiguous()
    power = int(poly.gamma) if poly.gamma in (0, 1, 2, 3, 4) else None
    coefficients = torch.tensor((poly.gamma, *poly.epsilons), dtype=dtype)
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
        # torch says where it was, what happened, and, after an empty line, how to debug itself.
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        warnings.warn(
            "torch.compile failed, so that polyfocal's losses take their path without a compiler:"
            f" {reason}",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _compiled(
    wanted: tuple[bool, bool], power: int | None, terms: int, weighted: str | None, dtype: str
) -> Callable[..., None]:
    """The pass as one loop: into the sums of the rows, the gradient, or both, as ``wanted`` says.

    Its arguments are these outputs, the logits, a scale per column of the loss and of the gradient,
    the coefficients and, if ``weighted`` by row or entry, the weight. Everything in the key is a
    branch of the code.
    """

    def terms_of(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        # exp2, because Inductor stores an exp or a logarithm that is used twice in memory. The
        # number log2(e) is a literal: a global would be an argument of the loop.
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
        if power == 0:
            return q, ce, None
        if power is None:
            log_q = torch.clamp_max(x, 0.0) - log1p
            return q, ce, torch.exp2(gamma * 1.4426950408889634 * log_q)
        modulator = q
        for _ in range(power - 1):
            modulator = modulator * q
        return q, ce, modulator

    def run(*tensors: Tensor) -> None:
        out, (x, scale, slope_scale, coefficients, *weight) = tensors[:outputs], tensors[outputs:]
        # Scalars of the loop instead of numbers, so that it is compiled once for all values.
        poly = PolyFocal(coefficients[0], [coefficients[1 + j] for j in range(terms)])  # type: ignore[arg-type]
        q, ce, modulator = terms_of(x.to(coefficients.dtype), coefficients[0])
        if wanted[0]:
            loss = loss_of(poly, ce, q, modulator) * scale
            if weighted == "entry":
                loss = loss * weight[0]
            out[0].copy_(loss.sum(dim=1))
        if wanted[1]:
            slope = slope_of(poly, ce, q, modulator) * slope_scale
            if weighted:
                slope = slope * weight[0]
            out[-1].copy_(slope)

    outputs = sum(wanted)
    settings: dict[str, Any] = {"dynamic": True, "fullgraph": True, "options": _known_options()}
    # All keys share the code of these functions, which by default is compiled 8 times at most.
    if "recompile_limit" in _COMPILE_ARGUMENTS:
        settings["recompile_limit"] = 64
    return torch.compile(run, **settings)


def _known_options() -> dict[str, Any]:
    """The options of the compiler that this torch has."""
    known = torch._inductor.list_options()
    options = {name: value for name, value in _COMPILE_OPTIONS.items() if name in known}
    if isinstance(getattr(torch._inductor.config.cpp, _CONTRACT, None), bool):  # torch 2.4 to 2.6
        options[f"cpp.{_CONTRACT}"] = True
    return options
