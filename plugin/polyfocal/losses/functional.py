r"""The losses as functions of logits and targets.

Notation: C classes; x the logits; p = sigmoid(x) or softmax(x); p_t the probability that the model
gives to the target; alpha_t = alpha where the target is 1 and 1 - alpha where it is 0.

Common arguments, the same for every function here:

logits
    ``(N, C)`` in the sigmoid form (any shape with soft targets), ``(N, K)`` in the softmax form,
    K = C + 1 with the background last where there is one; floating point. float16 and bfloat16 are
    computed, and returned, in float32, also under autocast.
target
    Integer labels ``(N,)``: sigmoid in [0, C], C being background, softmax in [0, K - 1]; or
    soft targets of the logits' shape in [0, 1], in the softmax form with rows that sum to 1. The
    range is checked on the CPU; on other devices, where a check would stop the device, an integer
    label out of range fails in the kernel that uses it.
weight, class_weight, ignore_index, reduction, avg_factor
    See :mod:`polyfocal.losses.reduction`.

Every function returns a scalar, or for ``reduction='none'`` the unreduced loss: the logits' shape
in the sigmoid form, ``(N,)`` in the softmax form. Empty input gives a zero that is connected to
the graph. Every function raises :class:`polyfocal.errors.UserError` (a ValueError) for a shape,
dtype or range that is none of these.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.reduction import check_reduction, expand_weight, mean_scale
from polyfocal.losses.schedule import cyclical_weight
from polyfocal.ops import PolyFocal, sigmoid_poly_focal, softmax_poly_focal

__all__ = [
    "cyclical_focal_loss",
    "focal_loss",
    "gaussian_poly1_focal_loss",
    "poly1_cross_entropy",
    "poly1_focal_loss",
    "poly_n_loss",
]

PerClass = float | Sequence[float] | Tensor

_TINY = 1e-12  # beside a probability, so that its logarithm is finite; MMDetection's


def _is_finite(number: object) -> bool:
    # A config can hold anything in the place of a number.
    return isinstance(number, int | float) and math.isfinite(number)


def check_nonnegative(name: str, number: float) -> None:
    """Raises UserError unless the number is finite and >= 0."""
    if not (_is_finite(number) and number >= 0):
        raise UserError(f"{name}={number}: expected a finite number >= 0")


def check_epsilons(epsilons: Sequence[float], name: str = "epsilon") -> None:
    """Raises UserError unless epsilon_j >= -1/j, so that no power of (1 - p_t) is rewarded."""
    if not isinstance(epsilons, Sequence) or len(epsilons) == 0:
        raise UserError(f"{name}={epsilons}: expected a list of at least one coefficient")
    for j, epsilon in enumerate(epsilons, start=1):
        if not (_is_finite(epsilon) and epsilon >= -1 / j):
            which = name if len(epsilons) == 1 else f"{name}[{j - 1}]"
            raise UserError(
                f"{which}={epsilon}: expected a finite number >= {-1 / j:.4g}, below which the"
                " loss rewards errors"
            )


def check_alpha(alpha: PerClass | None) -> None:
    """Raises UserError unless alpha is None or one number, or one a class, in [0, 1]."""
    _check_per_class("alpha", alpha, high=1.0)


def check_class_weight(class_weight: Sequence[float] | Tensor | None) -> None:
    """Raises UserError unless class_weight is None or one finite number >= 0 a class."""
    if isinstance(class_weight, int | float):
        raise UserError(f"class_weight={class_weight}: expected one number a class")
    _check_per_class("class_weight", class_weight, high=math.inf)


def check_label_smoothing(label_smoothing: float, use_sigmoid: bool, soft: bool = False) -> None:
    """Raises UserError unless label_smoothing is in [0, 1), and 0 where it is not defined."""
    if not (_is_finite(label_smoothing) and 0 <= label_smoothing < 1):
        raise UserError(f"label_smoothing={label_smoothing}: expected a number in [0, 1)")
    if label_smoothing > 0 and (use_sigmoid or soft):
        raise UserError(
            f"label_smoothing={label_smoothing} is given with"
            f" {'use_sigmoid=True' if use_sigmoid else 'soft targets'}: it is defined for the"
            " softmax form with integer labels"
        )


def _check_per_class(name: str, value: PerClass | None, high: float) -> None:
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() == 0:
            raise UserError(f"{name} has shape {tuple(value.shape)}: expected one number a class")
        if value.device.type != "cpu":
            return  # reading it would stop the device; it was checked when the module was built
        value = value.tolist()
    numbers = list(value) if isinstance(value, Sequence) else [value]
    if not numbers:
        raise UserError(f"{name} is empty: expected one number a class")
    for number in numbers:
        if not (_is_finite(number) and 0 <= number <= high):
            limits = "in [0, 1]" if high == 1 else ">= 0"
            raise UserError(f"{name} holds {number}: expected finite numbers {limits}")


def focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = 0.25,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Focal loss, :math:`FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        use_sigmoid: one binary problem a class (True), or one softmax over the classes (False).
        gamma: >= 0; 0 is cross-entropy.
        alpha: in [0, 1]: a number, one a class, or None for no such weight. In the softmax form,
            which has no targets 0, it multiplies the rows of its class.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 5.
    """
    check_nonnegative("gamma", gamma)
    return _loss(
        logits,
        target,
        weight,
        PolyFocal(gamma),
        use_sigmoid,
        alpha,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
    )


def poly1_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = 0.25,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 focal loss.

    .. math:: L = \alpha_t [-(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}]

    alpha_t weighs both terms, so that epsilon = -1 takes away exactly the leading power of the
    focal loss and the loss stays non-negative and monotone in p_t for every epsilon >= -1. Code
    that weighs the first term only gives another meaning to epsilon; its values do not carry over.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        epsilon: >= -1; 0 is the focal loss.
        use_sigmoid, gamma, alpha: as in :func:`focal_loss`.

    Source: Leng et al., PolyLoss (2022), its form for the alpha-balanced focal loss.
    """
    check_nonnegative("gamma", gamma)
    check_epsilons([epsilon])
    return _loss(
        logits,
        target,
        weight,
        PolyFocal(gamma, (epsilon,)),
        use_sigmoid,
        alpha,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
    )


def poly1_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 cross-entropy, :math:`-\log p_t + \epsilon (1 - p_t)`.

    With label smoothing a (softmax form), y_k = (1 - a) [k = y] + a / K:
    :math:`-\sum_k y_k \log p_k + \epsilon \sum_k y_k (1 - p_k)`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        epsilon: >= -1; 0 is cross-entropy.
        use_sigmoid: as in :func:`focal_loss`; True is Poly-1 on binary cross-entropy.
        label_smoothing: a in [0, 1); softmax form with integer labels.

    Source: Leng et al., PolyLoss (2022), its pseudocode of Poly-1.
    """
    check_epsilons([epsilon])
    return _loss(
        logits,
        target,
        weight,
        PolyFocal(0.0, (epsilon,)),
        use_sigmoid,
        None,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
        label_smoothing,
    )


def poly_n_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilons: Sequence[float],
    use_sigmoid: bool,
    gamma: float = 0.0,
    alpha: PerClass | None = None,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-N, :math:`\alpha_t [-(1-p_t)^\gamma \log p_t + \sum_j \epsilon_j (1-p_t)^{\gamma+j}]`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        epsilons: (epsilon_1, ..., epsilon_N), epsilon_j >= -1/j.
        use_sigmoid, alpha: as in :func:`focal_loss`.
        gamma: >= 0; 0, the default, perturbs cross-entropy, as the paper does.

    Source: Leng et al., PolyLoss (2022), Poly-N.
    """
    check_nonnegative("gamma", gamma)
    check_epsilons(epsilons, "epsilons")
    return _loss(
        logits,
        target,
        weight,
        PolyFocal(gamma, tuple(epsilons)),
        use_sigmoid,
        alpha,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
    )


def cyclical_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    progress: float,
    use_sigmoid: bool,
    gamma_hc: float = 3.0,
    gamma_lc: float = 2.0,
    factor: float = 4.0,
    alpha: PerClass | None = None,
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Cyclical focal loss.

    .. math::
        L = -[\xi (1 + p_t)^{\gamma_{hc}} + (1 - \xi) (1 - p_t)^{\gamma_{lc}}] \log p_t

    with xi from :func:`polyfocal.losses.schedule.cyclical_weight`. This is the paper's softmax
    form. In the sigmoid form it holds for the entries with target 1; those with target 0 keep the
    focal loss, :math:`-(1 - p_t)^{\gamma_{lc}} \log p_t`, at every xi. The paper's cycle weighs
    the one log p_t of a sample's label; the sigmoid form replaces the softmax's normaliser by an
    explicit term for every other class, which the cycle never weighed, and in a dense head those
    terms are some 10^5 confident backgrounds a picture that (1 + p_t)^gamma_hc would raise
    eightfold where the focal modulator silences them. A soft target y weighs xi by y.

    With label smoothing a (softmax form), the classes other than the label have the weight
    (1 - xi) p_k^gamma_lc + xi on their -(a / K) log p_k.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        progress: part of the training that is done, clamped to [0, 1].
        use_sigmoid, alpha: as in :func:`focal_loss`.
        gamma_hc: exponent of the high-confidence term, >= 0.
        gamma_lc: exponent of the low-confidence (focal) term, >= 0.
        factor: >= 1, see the schedule.
        label_smoothing: a in [0, 1); softmax form with integer labels.

    Source: Smith, Cyclical Focal Loss (2022); the sigmoid form is this project's.
    """
    check_nonnegative("gamma_hc", gamma_hc)
    check_nonnegative("gamma_lc", gamma_lc)
    return _loss(
        logits,
        target,
        weight,
        PolyFocal(gamma_lc, (), cyclical_weight(progress, factor), gamma_hc),
        use_sigmoid,
        alpha,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
        label_smoothing,
    )


def gaussian_poly1_focal_loss(
    probabilities: Tensor,
    heatmap: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float = 2.0,
    gamma: float = 4.0,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 Gaussian focal loss, of probabilities.

    .. math:: L = w_t [-(1 - p_t)^\alpha \log p_t + \epsilon (1 - p_t)^{\alpha + 1}]

    with :math:`p_t = p, w_t = 1` at the peaks, where the heatmap y is exactly 1, and
    :math:`p_t = 1 - p, w_t = (1 - y)^\gamma` elsewhere. w_t weighs both terms, as alpha_t does in
    :func:`poly1_focal_loss`. alpha and gamma are named as in the Gaussian focal loss, whose alpha
    is the focal loss's gamma.

    Args:
        probabilities: any shape, floating point, in [0, 1]; at 0 and 1 exactly the loss is finite.
        heatmap: the same shape, in [0, 1].
        weight: the same shape.
        epsilon: >= -1; 0 is the Gaussian focal loss.
        alpha, gamma: >= 0.
        reduction, avg_factor: see :mod:`polyfocal.losses.reduction`.

    Returns:
        A scalar, or for ``reduction='none'`` the probabilities' shape; float32, or float64 for
        float64 probabilities.

    Source: Law and Deng, CornerNet (2018), equation 1, and Leng et al., PolyLoss (2022); derived
    in docs/losses/gaussian_poly1_focal.md.
    """
    check_epsilons([epsilon])
    check_nonnegative("alpha", alpha)
    check_nonnegative("gamma", gamma)
    check_reduction(reduction, avg_factor)
    _check_heatmap(probabilities, heatmap)
    dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    with torch.autocast(probabilities.device.type, enabled=False):
        p, y = probabilities.to(dtype), heatmap.detach().to(dtype)
        peak = y == 1
        p_t, q_t = torch.where(peak, p, 1 - p), torch.where(peak, 1 - p, p)
        # At q_t = 0 a power below 1 has an infinite slope; below the limit it has none.
        q_t = q_t.clamp_min(_TINY)
        loss = -(q_t**alpha) * torch.log(p_t + _TINY)
        if epsilon:
            loss = loss + epsilon * q_t ** (alpha + 1)
        loss = loss * torch.where(peak, 1.0, (1 - y) ** gamma)
        if weight is not None:
            loss = loss * expand_weight(weight, loss.shape, dtype)
        if reduction == "none":
            return loss
        scale = mean_scale(loss.shape, None, avg_factor, dtype) if reduction == "mean" else 1.0
        return loss.sum() * scale


def _check_heatmap(probabilities: Tensor, heatmap: Tensor) -> None:
    """Raises UserError unless both have one shape and, where that can be seen, are in [0, 1]."""
    if not probabilities.is_floating_point() or heatmap.shape != probabilities.shape:
        raise UserError(
            f"got probabilities {tuple(probabilities.shape)} {probabilities.dtype}, heatmap"
            f" {tuple(heatmap.shape)} {heatmap.dtype}: expected floating point and one shape"
        )
    if heatmap.numel() == 0 or heatmap.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, tensor in (("probabilities range", probabilities), ("the heatmap ranges", heatmap)):
        low, high = (bound.item() for bound in torch.aminmax(tensor.detach()))
        if not 0 <= low <= high <= 1:  # also when NaN
            raise UserError(f"{name} from {low:.4g} to {high:.4g}: expected 0 to 1")


def _loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    poly: PolyFocal,
    use_sigmoid: bool,
    alpha: PerClass | None,
    class_weight: Sequence[float] | Tensor | None,
    ignore_index: int | None,
    reduction: str,
    avg_factor: Tensor | float | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Checks, computes, weighs and reduces: the one path of every function above."""
    check_reduction(reduction, avg_factor)
    check_alpha(alpha)
    check_class_weight(class_weight)
    soft = _check_input(logits, target, use_sigmoid, ignore_index)
    check_label_smoothing(label_smoothing, use_sigmoid, soft)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    reduce = reduction != "none"
    with torch.autocast(logits.device.type, enabled=False):
        keep = None
        if soft:
            target = target.detach().to(dtype)
        elif ignore_index is not None:
            keep = target != ignore_index
            target = torch.where(keep, target, 0)
        columns = logits.shape[-1] if logits.dim() > 1 else 1
        alpha = _per_class("alpha", alpha, logits, columns, dtype)
        per_class = _per_class("class_weight", class_weight, logits, columns, dtype)
        shape = logits.shape if use_sigmoid else logits.shape[:1]
        if weight is not None:
            weight = expand_weight(weight, shape, dtype)
        if keep is not None:
            keep_entries = keep.unsqueeze(1) if use_sigmoid else keep
            weight = keep_entries.to(dtype) if weight is None else weight * keep_entries
        scale = mean_scale(shape, keep, avg_factor, dtype) if reduction == "mean" else 1.0
        if use_sigmoid:
            cw = 1.0 if per_class is None else per_class
            positive, negative = (cw, cw) if alpha is None else (alpha * cw, (1.0 - alpha) * cw)
            return sigmoid_poly_focal(
                logits, target, poly, positive, negative, weight, reduce, scale
            )
        factors: list[Tensor | float] = []
        for value in (per_class, alpha):
            if isinstance(value, Tensor) and value.dim() == 1:
                of_rows = target @ value if soft else value[target]
                weight = of_rows if weight is None else weight * of_rows
            elif value is not None:
                factors.append(value)
        loss = softmax_poly_focal(logits, target, poly, weight, label_smoothing, reduce, scale)
        for factor in factors:
            loss = loss * factor
        return loss


def _per_class(
    name: str, value: PerClass | None, logits: Tensor, columns: int, dtype: torch.dtype
) -> Tensor | float | None:
    """The value as None, a float, or a tensor (columns,) beside the logits."""
    if value is None or isinstance(value, int | float):
        return value
    value = torch.as_tensor(value, dtype=dtype, device=logits.device)
    if value.dim() and value.shape != (columns,):
        raise UserError(
            f"{name} has {value.numel()} values: expected {columns}, one for each column of logits"
            f" of shape {tuple(logits.shape)}"
        )
    return value


def _check_input(
    logits: Tensor, target: Tensor, use_sigmoid: bool, ignore_index: int | None
) -> bool:
    """Raises UserError unless target fits logits; returns whether the targets are soft."""
    got = (
        f"logits {tuple(logits.shape)} {logits.dtype}, target {tuple(target.shape)} {target.dtype}"
    )
    if not logits.is_floating_point():
        raise UserError(f"got {got}: expected floating-point logits")
    soft = target.shape == logits.shape and (use_sigmoid or logits.dim() == 2)
    if not soft:
        if logits.dim() != 2 or target.shape != logits.shape[:1]:
            raise UserError(
                f"got {got}: expected logits (N, C) with integer labels (N,), or targets of the"
                " logits' shape"
            )
        if target.dtype != torch.int64:
            raise UserError(f"got {got}: expected labels (N,) of dtype torch.int64")
        if logits.shape[1] == 0:
            raise UserError(f"got {got}: expected at least one column of logits")
    elif target.is_complex() or not (use_sigmoid or target.is_floating_point()):
        raise UserError(f"got {got}: expected floating-point targets of the logits' shape")
    # A range check reads the data: it would stop a GPU and break a compiled graph.
    if target.numel() == 0 or target.device.type != "cpu" or torch.compiler.is_compiling():
        return soft
    low, high = (bound.item() for bound in torch.aminmax(target))
    if soft:
        if not 0 <= low <= high <= 1:  # also when NaN
            raise UserError(f"soft targets range from {low:.4g} to {high:.4g}: expected 0 to 1")
        return soft
    top = logits.shape[1] if use_sigmoid else logits.shape[1] - 1
    if low < 0 or high > top:
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
    return soft
