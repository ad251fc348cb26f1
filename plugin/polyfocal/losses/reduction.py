"""What weights, ``ignore_index`` and ``reduction`` mean, once, for every loss.

With l the unreduced loss, ``(N, C)`` in the sigmoid form and ``(N,)`` in the softmax form, and w
the product of all weights below (1 where there is none):

===========  ===========================  ====================================================
reduction    without ``avg_factor``       with ``avg_factor`` a
===========  ===========================  ====================================================
``none``     w l, l's shape               w l, l's shape; a is not used
``sum``      sum(w l)                     refused, as in MMDetection
``mean``     sum(w l) / (entries that     sum(w l) / (a + eps), eps = 1.2e-7 (float32's),
             are not ignored, at least    as in MMDetection
             1)
===========  ===========================  ====================================================

==================  ===========================================================================
``weight``          sigmoid: ``(N,)`` or ``(N, 1)`` a row, ``(N, C)`` or ``(N * C,)`` an entry,
                    for logits of more dimensions their shape or ``(..., 1)``;
                    softmax: ``(N,)``
``class_weight``    sigmoid: ``(C,)``, weighs column c, its positives and its negatives;
                    softmax: one a column, weighs a row by its class (by sum_k y_k w_k for
                    soft targets)
``ignore_index``    rows with this integer label are exactly 0, gradient included
==================  ===========================================================================
"""

import torch
from torch import Tensor

from polyfocal.errors import UserError

REDUCTIONS = ("none", "mean", "sum")
_EPS = torch.finfo(torch.float32).eps


def check_reduction(reduction: str, avg_factor: object = None) -> None:
    """Raises UserError for an unknown reduction, or for 'sum' with an ``avg_factor``."""
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if reduction == "sum" and avg_factor is not None:
        raise UserError("avg_factor is given with reduction='sum': expected 'mean' or 'none'")


def expand_weight(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight in a shape that broadcasts over a loss of ``shape`` by rows or by entries.

    Raises:
        UserError: any other shape, or a dtype that is neither floating point, integer nor bool.
    """
    if weight.is_complex():
        raise UserError(f"weight has dtype {weight.dtype}: expected floating point")
    weight = weight.to(dtype)
    if weight.shape == shape:
        return weight
    if len(shape) >= 2 and weight.shape == (*shape[:-1], 1):
        return weight
    if len(shape) == 2:
        rows, columns = shape
        if weight.shape == (rows,):
            return weight.unsqueeze(1)
        if weight.shape == (rows * columns,):
            return weight.view(rows, columns)
    allowed = "(N,), (N, 1), (N, C) or (N * C,)" if len(shape) == 2 else "that of the loss"
    if len(shape) > 2:
        allowed += ", or 1 in the place of its last number,"
    raise UserError(
        f"weight has shape {tuple(weight.shape)}: expected {allowed} for a loss of shape"
        f" {tuple(shape)}"
    )


def mean_scale(
    shape: torch.Size, keep: Tensor | None, avg_factor: Tensor | float | None, dtype: torch.dtype
) -> Tensor | float:
    """The factor that makes the sum of a loss what reduction='mean' says.

    Args:
        shape: the shape of the unreduced loss.
        keep: (N,) bool, False for the rows that are ignored; None for none of them.
        avg_factor: a number or a tensor of one element; None to count the entries.
        dtype: of the sum.

    Raises:
        UserError: ``avg_factor`` has more than one element.
    """
    if avg_factor is not None:
        if isinstance(avg_factor, Tensor):
            if avg_factor.numel() != 1:
                raise UserError(
                    f"avg_factor has shape {tuple(avg_factor.shape)}: expected one number"
                )
            avg_factor = avg_factor.detach().reshape(()).to(dtype)
        return 1.0 / (avg_factor + _EPS)
    if keep is None:
        return 1.0 / max(shape.numel(), 1)
    columns = shape[1] if len(shape) == 2 else 1
    return 1.0 / (keep.sum() * columns).clamp_min(1).to(dtype)
