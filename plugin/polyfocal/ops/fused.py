"""Where a loss is computed: fused passes where there are some, else composed operations.

A fused loss keeps one buffer of the logits' size for backward. By default that is the logits
themselves: backward reads them again and writes the gradient for whatever gradient comes from
above, and a second derivative can be taken. The other choice is the gradient, see
:func:`keep_for_backward`.
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
from polyfocal.ops.poly_focal import (
    PolyFocal,
    composed_sigmoid,
    composed_softmax,
    softmax_margin,
)

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


KEPT = ("logits", "gradient")
_kept = "logits"


def keep_for_backward(what: str) -> str:
    """Chooses the buffer that a reduced loss keeps for backward, from now on, in this process.

    Args:
        what: 'logits', the default; or 'gradient': the gradient is computed together with the
            loss, in one pass. That saves reading the logits twice, costs another pass where the
            gradient that comes from above is not 1 (a loss_weight, gradient scaling), and has no
            second derivative. docs/performance.md has both measured.

    Returns:
        The choice until now.

    Raises:
        UserError: another value.
    """
    global _kept
    if what not in KEPT:
        raise UserError(f"keep_for_backward({what!r}): expected one of {', '.join(KEPT)}")
    before, _kept = _kept, what
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

    torch.compile fuses the composed operations itself. Gradients of weights are theirs, too.
    """
    if _path == "composed" or not is_plain(logits):
        return None
    if any(isinstance(other, Tensor) and other.requires_grad for other in others):
        return None
    if logits.device.type == "cpu":
        return cpu
    if logits.device.type != "cuda" or logits.dtype == torch.float64:
        return None
    triton_kernels = _triton()
    if triton_kernels is not None and logits.shape[1] > triton_kernels.MAX_COLUMNS:
        return None
    return triton_kernels


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
        positive, negative: weights of the entries with target 1 and 0, a number or one a class.
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
    if reduce and _kept == "gradient" and logits.requires_grad and torch.is_grad_enabled():

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            upstream = torch.as_tensor(scale, device=x.device)
            arguments = (x, target, poly, positive, negative, weight, True, _path == "auto")
            total, gradient = backend.sigmoid(*arguments, upstream=upstream)
            return total * upstream, gradient

        return _KeptGradient.apply(logits, run)[0]
    loss = _Sigmoid.apply(logits, target, weight, positive, negative, poly, reduce, backend)
    return loss * scale if reduce else loss


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
    if reduce and _kept == "gradient" and logits.requires_grad and torch.is_grad_enabled():

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            upstream = torch.as_tensor(scale, device=x.device)
            total, margin = backend.softmax_loss(x, target, poly, weight, True)
            gradient = backend.softmax_gradient(upstream, margin, x, target, poly, weight)
            return total * upstream, gradient

        return _KeptGradient.apply(logits, run)[0]
    loss = _Softmax.apply(logits, target, weight, poly, reduce, backend)[0]
    return loss * scale if reduce else loss


def _second_order(loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of the logits as a graph of its own, for a derivative of the gradient."""
    return torch.func.vjp(loss, logits)[1](upstream)[0]


class _KeptGradient(torch.autograd.Function):
    """A scalar loss that comes with its gradient."""

    @staticmethod
    def forward(
        logits: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        return run(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else backward is given zeros of the gradient's size
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise UserError(
                "a second derivative is asked for and keep_for_backward('gradient') kept none of"
                " what it needs: call polyfocal.ops.keep_for_backward('logits') first"
            )
        (gradient,) = ctx.saved_tensors
        # On a GPU, looking at the number would wait for the device.
        if upstream.device.type == "cpu" and upstream.item() == 1.0:
            return gradient, None
        return (gradient * upstream).to(gradient.dtype), None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        positive: Tensor | float,
        negative: Tensor | float,
        poly: PolyFocal,
        reduce: bool,
        backend: ModuleType,
    ) -> Tensor:
        arguments = (logits, target, poly, positive, negative, weight, reduce)
        return backend.sigmoid(*arguments, _path == "auto")[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target, weight, positive, negative, ctx.poly, ctx.reduce, ctx.backend = inputs
        scales = (positive, negative)
        ctx.numbers = [None if isinstance(s, Tensor) else s for s in scales]
        tensors = [s if isinstance(s, Tensor) else None for s in scales]
        ctx.save_for_backward(logits, target, weight, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, *tensors = ctx.saved_tensors
        positive, negative = (
            n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True)
        )
        if torch.is_grad_enabled():

            def loss(x: Tensor) -> Tensor:
                each = composed_sigmoid(x, target, ctx.poly, positive, negative, weight)
                return each.sum() if ctx.reduce else each

            gradient = _second_order(loss, logits, upstream)
        else:
            arguments = (logits, target, ctx.poly, positive, negative, weight, ctx.reduce)
            _, gradient = ctx.backend.sigmoid(
                *arguments, _path == "auto", want_loss=False, upstream=upstream
            )
        return gradient, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, poly, reduce, _ = inputs

        def one(x: Tensor, y: Tensor, w: Tensor | None, positive: Any, negative: Any) -> Tensor:
            loss = composed_sigmoid(x, y, poly, positive, negative, w)
            return loss.sum() if reduce else loss

        return torch.vmap(one, in_dims[: len(tensors)])(*tensors), 0


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        poly: PolyFocal,
        reduce: bool,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        return backend.softmax_loss(logits, target, poly, weight, reduce)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, weight, ctx.poly, ctx.reduce, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, target, weight, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight, margin = ctx.saved_tensors
        if torch.is_grad_enabled():

            def loss(x: Tensor) -> Tensor:
                each = composed_softmax(x, target, ctx.poly, weight)
                return each.sum() if ctx.reduce else each

            gradient = _second_order(loss, logits, upstream)
        else:
            gradient = ctx.backend.softmax_gradient(
                upstream, margin, logits, target, ctx.poly, weight
            )
        return gradient, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        *tensors, poly, reduce, _ = inputs

        def one(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
            loss = composed_softmax(x, y, poly, w)
            return (loss.sum() if reduce else loss), softmax_margin(x, y)

        return torch.vmap(one, in_dims[: len(tensors)])(*tensors), (0, 0)
