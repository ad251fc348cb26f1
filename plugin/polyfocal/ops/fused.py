"""Chooses how a loss is computed: by a fused pass if there is one, else by composed operations.

A fused loss keeps one buffer of the logits' size for backward, the logits themselves. Backward
reads them again and writes the gradient. On a CPU a small input keeps a second buffer: the softmax
form its softmax, the sum of the sigmoid form its gradient. A second derivative goes through the
composed operations.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polyfocal._torch import is_plain
from polyfocal.errors import UserError
from polyfocal.ops import cpu
from polyfocal.ops.poly_focal import PolyFocal, composed_sigmoid, composed_softmax

PATHS = ("auto", "blocked", "composed")
_VARIABLE = "POLYFOCAL_OPS"


def _checked(path: str, name: str) -> str:
    if path not in PATHS:
        raise UserError(f"{name}={path!r}: expected one of {', '.join(PATHS)}")
    return path


_path = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


def use_path(path: str) -> str:
    """Chooses how losses are computed from now on, in this process.

    Args:
        path: 'auto': the fastest there is; 'blocked': as 'auto', without torch.compile on the CPU;
            'composed': plain differentiable torch operations everywhere. The environment variable
            POLYFOCAL_OPS takes the same values.

    Returns:
        The path until now.

    Raises:
        UserError: another value.
    """
    global _path
    before, _path = _path, _checked(path, "path")
    return before


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from polyfocal.ops import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _backend(logits: Tensor, *others: object) -> ModuleType | None:
    """The module with the fused passes for these inputs, None for the composed operations.

    torch.compile fuses the composed operations itself. They also give the gradients of weights.
    """
    if _path == "composed" or not is_plain(logits):
        return None
    for other in others:
        if isinstance(other, Tensor) and other.requires_grad:
            return None
    device = logits.device.type
    if device == "cpu":
        return cpu
    return _triton() if device == "cuda" and logits.dtype != torch.float64 else None


def sigmoid_poly_focal(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Tensor | float = 1.0,
    negative: Tensor | float = 1.0,
    weight: Tensor | None = None,
    reduce: bool = False,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Weighted binary losses of the entries, or their sum times ``scale``.

    Args:
        logits: (N, C), or any shape with a target of that shape; floating point.
        target: (N,) int64 in [0, C], C being background; or the logits' shape, in [0, 1].
        poly: coefficients.
        positive, negative: weights of the entries with target 1 and 0, a number or one per class.
        weight: (N, 1), (N, C) or, with a target of the logits' shape, that shape; None for 1.
        reduce: return the sum.
        scale: factor on the sum, a number or a scalar without a gradient.

    Returns:
        The logits' shape, or a scalar; float64 for float64 logits, else float32.
    """
    backend = None
    if target.shape != logits.shape:
        backend = _backend(logits, weight, positive, negative)
    if backend is None:
        loss = composed_sigmoid(logits, target, poly, positive, negative, weight)
        return loss.sum() * scale if reduce else loss
    return _Sigmoid.apply(
        logits, target, weight, positive, negative, poly, scale if reduce else None, backend
    )


def softmax_poly_focal(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduce: bool = False,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Weighted single-label losses of the rows, or their sum times ``scale``.

    Args:
        logits: (N, K), floating point.
        target: (N,) int64 in [0, K - 1]; or (N, K) with rows that sum to 1.
        poly: coefficients.
        weight: (N,); None for 1.
        label_smoothing: see :func:`polyfocal.ops.poly_focal.composed_softmax`.
        reduce: return the sum.
        scale: factor on the sum, a number or a scalar without a gradient.

    Returns:
        (N,), or a scalar; float64 for float64 logits, else float32.
    """
    backend = None
    if target.shape != logits.shape and label_smoothing == 0:
        backend = _backend(logits, weight)
    if backend is None:
        loss = composed_softmax(logits, target, poly, weight, label_smoothing)
        return loss.sum() * scale if reduce else loss
    return _Softmax.apply(logits, target, weight, poly, scale if reduce else None, backend)


def _second_order(loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of the logits as a graph of its own, for a derivative of the gradient."""
    return torch.func.vjp(loss, logits)[1](upstream)[0]


def one_pass(
    ctx: Any, backend: ModuleType, arguments: tuple[Any, ...], reduce: bool
) -> tuple[Tensor, Tensor | None]:
    """The fused sigmoid loss of the arguments, and its gradient if it is worth keeping."""
    logits = arguments[0]
    keep = reduce and ctx.needs_input_grad[0] and backend is cpu and cpu.is_small(logits)
    upstream = logits.new_ones(()) if keep else None
    return backend.sigmoid(*arguments, reduce, _path == "auto", upstream=upstream)


class _Sigmoid(torch.autograd.Function):
    """The sum times ``scale``, or, without one, the losses of the entries."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        positive: Tensor | float,
        negative: Tensor | float,
        poly: PolyFocal,
        scale: Tensor | float | None,
        backend: ModuleType,
    ) -> Tensor:
        arguments = (logits, target, poly, positive, negative, weight)
        loss, gradient = one_pass(ctx, backend, arguments, scale is not None)
        ctx.poly, ctx.scale, ctx.backend = poly, scale, backend
        scales = (positive, negative)
        ctx.numbers = [None if isinstance(s, Tensor) else s for s in scales]
        tensors = [s if isinstance(s, Tensor) else None for s in scales]
        ctx.save_for_backward(logits, target, weight, gradient, *tensors)
        return loss if scale is None else loss.mul_(scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, gradient, *tensors = ctx.saved_tensors
        if ctx.scale is not None:
            upstream = upstream * ctx.scale
        positive, negative = (
            n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True)
        )
        if torch.is_grad_enabled():

            def loss(x: Tensor) -> Tensor:
                each = composed_sigmoid(x, target, ctx.poly, positive, negative, weight)
                return each if ctx.scale is None else each.sum()

            gradient = _second_order(loss, logits, upstream)
        elif gradient is not None:
            gradient = gradient * upstream
        else:
            arguments = (logits, target, ctx.poly, positive, negative, weight)
            _, gradient = ctx.backend.sigmoid(
                *arguments,
                ctx.scale is not None,
                _path == "auto",
                want_loss=False,
                upstream=upstream,
            )
        return gradient, None, None, None, None, None, None, None


class _Softmax(torch.autograd.Function):
    """The sum times ``scale``, or, without one, the losses of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        poly: PolyFocal,
        scale: Tensor | float | None,
        backend: ModuleType,
    ) -> Tensor:
        loss, kept = backend.softmax_loss(
            logits, target, poly, weight, scale is not None, ctx.needs_input_grad[0]
        )
        ctx.poly, ctx.scale, ctx.backend = poly, scale, backend
        ctx.save_for_backward(logits, target, weight, *kept)
        return loss if scale is None else loss.mul_(scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, *kept = ctx.saved_tensors
        scale = 1.0 if ctx.scale is None else ctx.scale
        if torch.is_grad_enabled():

            def loss(x: Tensor) -> Tensor:
                each = composed_softmax(x, target, ctx.poly, weight)
                return each if ctx.scale is None else each.sum() * scale

            gradient = _second_order(loss, logits, upstream)
        else:
            gradient = ctx.backend.softmax_gradient(
                upstream, kept, logits, target, ctx.poly, weight, scale
            )
        return gradient, None, None, None, None, None
