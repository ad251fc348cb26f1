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
``weight``          sigmoid: ``(N,)`` or ``(N, 1)`` per row, ``(N, C)`` or ``(N * C,)`` per entry,
                    for logits of more dimensions their shape or ``(..., 1)``;
                    softmax: ``(N,)``
``class_weight``    sigmoid: ``(C,)``, weighs column c, its positives and its negatives;
                    softmax: one per column, weighs a row by its class (by sum_k y_k w_k for
                    soft targets); soft targets of more than two dimensions have none
``ignore_index``    rows with this integer label are exactly 0, gradient included, whatever else
                    they hold
==================  ===========================================================================

Logits ``(N, C, ...)`` with a map of integer labels ``(N, ...)``, as semantic segmentation has them,
are taken as rows, one for each place. The unreduced loss is then ``(N, C, ...)`` or ``(N, ...)``, a
``weight`` has the shape of the map, ``(N, 1, ...)`` or, in the sigmoid form, ``(N, C, ...)``, and
the entries of a mean are those of all places. The rows are a copy of the logits, unless their
memory is channels last.

Targets are labels ``(N,)`` of dtype int64, or soft: of the logits' shape and in [0, 1], in the
softmax form with rows that sum to 1. A soft target has no gradient. A soft target that leaves
[0, 1] by no more than rounding is taken as the bound. Integers of the logits' shape are soft
targets too if there is more than one column. With one column they are refused: they would be
mistaken for labels, which mean the opposite there. Ranges are checked on the CPU. Elsewhere a look
at the data would stop the device, so a soft target out of range makes the loss NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from polyfocal._torch import can_read, is_compiling
from polyfocal.errors import UserError
from polyfocal.losses.settings import REDUCTION, Common, PerClass, Unpack, check_smoothing
from polyfocal.ops import PolyFocal, sigmoid_poly_focal, softmax_poly_focal
from polyfocal.ops.poly_focal import compute_dtype

_EPS = torch.finfo(torch.float32).eps
_ROUNDING = 1e-3  # an overlap that was computed in half precision


class Rows(NamedTuple):
    """What a loss is computed from, checked.

    Attributes:
        logits: 0 in the rows that are ignored.
        target: labels, 0 in the rows that are ignored; or soft targets.
        soft: whether the targets are soft.
        use_sigmoid: the form.
        keep: (N,) bool, False for the rows that are ignored; None for none of them.
        weight: broadcasts over the unreduced loss; None for 1.
        class_weight: a number, one per column, or None.
        reduction: as in the module.
        scale: factor on the sum.
        places: the shape of the map of labels that the rows were; None where they were rows.
    """

    logits: Tensor
    target: Tensor
    soft: bool
    use_sigmoid: bool
    keep: Tensor | None
    weight: Tensor | None
    class_weight: Tensor | float | None
    reduction: str
    scale: Tensor | float
    places: torch.Size | None = None


def prepare(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    use_sigmoid: bool,
    class_weight: PerClass | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
    check_range: bool = True,
) -> Rows:
    """Checks the input of a loss of labels and logits, and prepares it.

    Args:
        logits, target, weight, use_sigmoid: those of the loss.
        class_weight, ignore_index, reduction, avg_factor: see above.
        check_range: whether to look for labels out of range.

    Raises:
        UserError: a shape, dtype or range that the module does not take.
    """
    check_reduction(reduction, avg_factor)
    places = _places(logits, target)
    own = False
    if places is not None:
        logits, own = as_rows(logits), not logits.movedim(1, -1).is_contiguous()
        weight = None if weight is None else _weight_of_rows(weight, places, logits, use_sigmoid)
        target = target.reshape(-1).long()
    soft = _check_input(logits, target, use_sigmoid)
    if check_range and not soft:
        _check_labels(logits, target, use_sigmoid, ignore_index)
    dtype = compute_dtype(logits)
    shape = logits.shape if use_sigmoid else logits.shape[:1]
    if weight is not None:
        weight = expand_weight(weight, shape, dtype)
    keep = None
    if soft:
        target = in_unit(target.detach().to(dtype))
    elif ignore_index is not None:
        keep = target != ignore_index
        if can_read(keep) and bool(keep.all()):
            keep = None
        else:
            target = torch.where(keep, target, 0)
            # They are chosen and not multiplied by 0: what they hold may be NaN.
            if own and not is_compiling():
                # Weights of 0 below make their gradient 0. Through .data, since a view that
                # autograd sees changed costs one more buffer in backward.
                logits.data.masked_fill_(~keep.unsqueeze(1), 0.0)
            else:
                logits = without_ignored(logits, keep)
            shown = keep.unsqueeze(1) if use_sigmoid else keep
            weight = shown.to(dtype) if weight is None else torch.where(shown, weight, 0.0)
    scale = mean_scale(shape, keep, avg_factor, dtype) if reduction == "mean" else 1.0
    columns = logits.shape[-1] if logits.dim() > 1 else 1
    by_class = per_class("class_weight", class_weight, logits, columns, dtype)
    return Rows(logits, target, soft, use_sigmoid, keep, weight, by_class, reduction, scale, places)


def _places(logits: Tensor, target: Tensor) -> torch.Size | None:
    """The shape of a map of labels, (N, ...) of logits (N, C, ...); None where there is none."""
    if logits.dim() < 3 or target.shape != logits.shape[:1] + logits.shape[2:]:
        return None
    dtype = target.dtype
    integers = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return target.shape if integers else None


def as_rows(values: Tensor) -> Tensor:
    """(N, C, ...) as rows (M, C): a view where the channels are last in memory, else a copy."""
    return values.movedim(1, -1).contiguous().flatten(0, -2)


def _weight_of_rows(
    weight: Tensor, places: torch.Size, logits: Tensor, use_sigmoid: bool
) -> Tensor:
    columns = logits.shape[1]
    if weight.shape == places or weight.shape == (places[0], 1, *places[1:]):
        return weight.reshape(-1)
    if use_sigmoid and weight.shape == (places[0], columns, *places[1:]):
        return as_rows(weight)
    of_entries = f", or {(places[0], columns, *places[1:])} for each entry" if use_sigmoid else ""
    raise UserError(
        f"weight has shape {tuple(weight.shape)}: expected {tuple(places)}, that of the map of"
        f" labels{of_entries}"
    )


def _unrolled(rows: Rows, loss: Tensor) -> Tensor:
    """An unreduced loss of rows in the shape of the logits or labels that they were."""
    if rows.places is None:
        return loss
    if loss.dim() == 1:
        return loss.view(rows.places)
    return loss.view(*rows.places, loss.shape[1]).movedim(-1, 1)


def without_ignored(values: Tensor, keep: Tensor | None) -> Tensor:
    """Values (N, C) with 0 in the rows that are ignored."""
    return values if keep is None else torch.where(keep.unsqueeze(1), values, 0.0)


def poly_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    use_sigmoid: bool,
    poly: PolyFocal,
    alpha: PerClass | None = None,
    label_smoothing: float = 0.0,
    **common: Unpack[Common],
) -> Tensor:
    """A member of the polynomial focal family of a loss's own input: prepared, weighed, reduced.

    Args:
        logits, target, weight, use_sigmoid, common: as in :func:`prepare`.
        poly, alpha, label_smoothing: as in :func:`weighed_poly`.
    """
    if use_sigmoid or is_compiling() or common.get("ignore_index") is not None:
        rows = prepare(logits, target, weight, use_sigmoid, **common)
        return weighed_poly(rows, poly, alpha, label_smoothing)
    # The softmax form looks up each label among the logits, which fails for one out of range. To
    # look for it first costs a twentieth of a step with few rows.
    rows = prepare(logits, target, weight, use_sigmoid, check_range=False, **common)
    try:
        return weighed_poly(rows, poly, alpha, label_smoothing)
    except (IndexError, RuntimeError):
        if not rows.soft:
            _check_labels(rows.logits, rows.target, use_sigmoid, None)
        raise


def weighed_poly(
    rows: Rows,
    poly: PolyFocal,
    alpha: PerClass | None = None,
    label_smoothing: float = 0.0,
    factor: Tensor | None = None,
    logits: Tensor | None = None,
) -> Tensor:
    """A member of the polynomial focal family, weighed and reduced.

    Args:
        rows: from :func:`prepare`.
        poly: coefficients.
        alpha: see :func:`polyfocal.losses.functional.focal_loss`.
        label_smoothing: see :func:`polyfocal.ops.poly_focal.composed_softmax`.
        factor: one more weight, of the unreduced loss's shape.
        logits: instead of those of ``rows``.
    """
    x = rows.logits if logits is None else logits
    check_smoothing(label_smoothing, rows.use_sigmoid, rows.soft)
    dtype, reduce = compute_dtype(x), rows.reduction != "none"
    weight = times(rows.weight, factor)
    of_alpha = per_class("alpha", alpha, x, x.shape[-1] if x.dim() > 1 else 1, dtype)
    if rows.use_sigmoid:
        cw = 1.0 if rows.class_weight is None else rows.class_weight
        positive, negative = (
            (cw, cw) if of_alpha is None else (of_alpha * cw, (1.0 - of_alpha) * cw)
        )
        loss = sigmoid_poly_focal(
            x, rows.target, poly, positive, negative, weight, reduce, rows.scale
        )
        return loss if reduce else _unrolled(rows, loss)
    number: Tensor | float = 1.0
    for value in (rows.class_weight, of_alpha):
        if isinstance(value, Tensor) and value.dim() == 1:
            weight = times(weight, rows.target @ value if rows.soft else value[rows.target])
        elif value is not None:
            number = number * value
    loss = softmax_poly_focal(x, rows.target, poly, weight, label_smoothing, reduce, rows.scale)
    loss = loss if isinstance(number, float) and number == 1.0 else loss * number
    return loss if reduce else _unrolled(rows, loss)


def weighed(rows: Rows, loss: Tensor) -> Tensor:
    """An unreduced loss of ``rows``, weighed and reduced.

    Args:
        rows: from :func:`prepare`.
        loss: (N, C) or (N,), finite in the rows that are ignored too.
    """
    cw, target = rows.class_weight, rows.target
    if isinstance(cw, Tensor) and not rows.use_sigmoid:
        cw = target @ cw if rows.soft else cw[target]
    if cw is not None:
        loss = loss * cw
    if rows.weight is not None:
        loss = loss * rows.weight
    if rows.reduction == "none":
        return _unrolled(rows, loss)
    return loss.sum() * rows.scale


def labels_only(rows: Rows, what: str) -> None:
    """Raises UserError if the targets are soft."""
    if rows.soft:
        raise UserError(
            f"got targets of the logits' shape {tuple(rows.target.shape)}: {what} takes integer"
            " labels (N,)"
        )


def times(weight: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """The product of those that are not None."""
    if weight is None or factor is None:
        return weight if factor is None else factor
    return weight * factor


def check_reduction(reduction: str, avg_factor: object = None) -> None:
    """Raises UserError for an unknown reduction, or for 'sum' with an ``avg_factor``."""
    REDUCTION.checked("reduction", reduction, "")
    if reduction == "sum" and avg_factor is not None:
        raise UserError("avg_factor is given with reduction='sum': expected 'mean' or 'none'")


def expand_weight(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight in a shape that broadcasts over a loss of ``shape`` by rows or by entries.

    Raises:
        UserError: any other shape, or a dtype that is neither floating point, integer nor bool.
    """
    if weight.dtype.is_complex:
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
        allowed += ", or 1 instead of its last number,"
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
        dtype: dtype of the sum.

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
        count = 1  # torch.compile of 2.1 knows no numel of a shape
        for size in shape:
            count = count * size
        return 1.0 / max(count, 1)
    columns = shape[1] if len(shape) == 2 else 1
    return 1.0 / (keep.sum() * columns).clamp_min(1).to(dtype)


def per_class(
    name: str, value: PerClass | None, logits: Tensor, columns: int, dtype: torch.dtype
) -> Tensor | float | None:
    """The value as None, a float, or a tensor (columns,) beside the logits.

    Raises:
        UserError: there are more or fewer numbers than columns, or logits of more dimensions, in
            which nothing says where the classes are.
    """
    if value is None or isinstance(value, (int, float)):
        return value
    value = torch.as_tensor(value, dtype=dtype, device=logits.device)
    if logits.dim() > 2 and value.numel() > 1:
        raise UserError(
            f"{name} has {value.numel()} values with soft targets {tuple(logits.shape)}: expected"
            " rows (N, C) for a number per class, or a map of integer labels (N, ...)"
        )
    if value.dim() and value.shape != (columns,):
        raise UserError(
            f"{name} has {value.numel()} values: expected {columns}, one for each column of logits"
            f" of shape {tuple(logits.shape)}"
        )
    return value


def in_unit(values: Tensor, name: str = "soft targets range") -> Tensor:
    """Values clamped to [0, 1] if only rounding left it; others become NaN, or are refused.

    Raises:
        UserError: values that are further out, or NaN, on a device that can be read.
    """
    if values.numel() == 0:
        return values
    if not can_read(values):
        inside = values.clamp(0.0, 1.0)
        return torch.where((values - inside).abs() <= _ROUNDING, inside, torch.nan)
    low, high = bounds(values)
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:  # also when NaN
        raise UserError(f"{name} from {low:.4g} to {high:.4g}: expected 0 to 1")
    return values if low >= 0 and high <= 1 else values.clamp(0.0, 1.0)


def bounds(values: Tensor) -> tuple[float, float]:
    """The least and the largest value of a CPU tensor that is not empty."""
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()  # torch 2.1 has no aminmax of them
    low, high = torch.aminmax(values.detach() if values.requires_grad else values)
    return low.item(), high.item()


def _check_input(logits: Tensor, target: Tensor, use_sigmoid: bool) -> bool:
    """Raises UserError unless target fits logits; returns whether the targets are soft."""
    soft = target.shape == logits.shape and (use_sigmoid or logits.dim() == 2)
    good = logits.is_floating_point()
    if good and soft:
        if target.is_floating_point():
            _check_sums(target, use_sigmoid)
            return True
        # One column of integers is as likely meant as labels, where 0 is the class.
        single = target.dim() < 2 or 1 in (target.shape[1], target.shape[-1])
        if (
            use_sigmoid
            and not target.dtype.is_complex
            and (target.dtype == torch.bool or not single)
        ):
            return True
    elif good and logits.dim() == 2 and target.shape == logits.shape[:1]:
        good = target.dtype == torch.int64 and logits.shape[1] > 0
        if good:
            return False
    raise UserError(_misfit(logits, target, soft))


def _misfit(logits: Tensor, target: Tensor, soft: bool) -> str:
    got = (
        f"got logits {tuple(logits.shape)} {logits.dtype}, target {tuple(target.shape)}"
        f" {target.dtype}: expected"
    )
    if not logits.is_floating_point():
        return f"{got} floating-point logits"
    if soft:
        return f"{got} int64 labels (N,), or floating-point targets of the logits' shape"
    if target.shape == logits.shape and logits.dim() > 2:
        return (
            f"{got} a map of integer labels {(logits.shape[0], *logits.shape[2:])}, or rows (N, C)"
            " of both: the softmax form takes soft targets of two dimensions only"
        )
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        return (
            f"{got} logits (N, C) with integer labels (N,), or (N, C, ...) with a map of labels"
            " (N, ...), or targets of the logits' shape"
        )
    if target.dtype != torch.int64:
        return f"{got} labels (N,) of dtype torch.int64"
    return f"{got} at least one column of logits"


def _check_sums(target: Tensor, use_sigmoid: bool) -> None:
    if use_sigmoid or target.numel() == 0 or not can_read(target):
        return
    wide = target.detach().to(compute_dtype(target))
    low, high = bounds(wide.sum(dim=1))
    allowed = max(_ROUNDING, 2 * torch.finfo(target.dtype).eps)
    if max(1 - low, high - 1) > allowed:
        in_unit(wide)  # an entry out of range says more
        raise UserError(
            f"rows of soft targets sum to between {low:.4g} and {high:.4g}: expected 1"
            " in the softmax form"
        )


def _check_labels(
    logits: Tensor, target: Tensor, use_sigmoid: bool, ignore_index: int | None
) -> None:
    if target.numel() == 0 or not can_read(target):
        return
    low, high = bounds(target)
    top = logits.shape[1] if use_sigmoid else logits.shape[1] - 1
    if low >= 0 and high <= top:
        return
    valid = (target >= 0) & (target <= top)
    if ignore_index is not None:
        valid |= target == ignore_index
    wrong = target[~valid]
    if len(wrong):
        background = f" ({top} is background)" if use_sigmoid else ""
        ignored = "" if ignore_index is None else f", or ignore_index={ignore_index}"
        raise UserError(
            f"label {wrong[0].item()} is out of range ({len(wrong)} of {len(target)} labels"
            f" are): expected 0 to {top}{background}{ignored}"
        )


def positives(labels: Tensor, columns: int) -> Tensor:
    """(N, columns) bool: which entry of a row is its label's."""
    return labels.unsqueeze(1) == torch.arange(columns, device=labels.device)
