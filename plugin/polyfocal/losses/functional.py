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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfocal._torch import autocast_off, can_read
from polyfocal.errors import UserError
from polyfocal.losses.reduction import check_reduction, expand_weight, mean_scale
from polyfocal.losses.schedule import cyclical_weight
from polyfocal.ops import PolyFocal, noised_gap, sigmoid_poly_focal, softmax_poly_focal
from polyfocal.ops.poly_focal import at_class, softmax_margin

__all__ = [
    "confidence_regularization",
    "cyclical_focal_loss",
    "debiased_focal_loss",
    "dual_focal_loss",
    "focal_loss",
    "gaussian_poly1_focal_loss",
    "imbalanced_noised_topk_loss",
    "noised_topk_loss",
    "poly1_cross_entropy",
    "poly1_focal_loss",
    "poly_n_loss",
    "product_of_experts",
    "reweighted_cross_entropy",
    "stepped_focal_loss",
    "topk_margins",
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
    for j, epsilon in enumerate(epsilons):  # torch.compile of 2.1 knows no start
        low = -1 / (j + 1)
        if not (_is_finite(epsilon) and epsilon >= low):
            which = name if len(epsilons) == 1 else f"{name}[{j}]"
            raise UserError(
                f"{which}={epsilon}: expected a finite number >= {low:.4g}, below which the"
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


def check_form(name: str, use_sigmoid: bool | None, form: bool) -> None:
    """Raises UserError unless ``use_sigmoid`` is the only form that a loss has."""
    if use_sigmoid is not form:
        raise UserError(f"use_sigmoid={use_sigmoid}: the {name} is defined for use_sigmoid={form}")


def check_topk(k: int, epsilon: float, num_samples: int, scale: float) -> None:
    """Raises UserError for settings that the noised top-K losses do not have."""
    for name, number in (("k", k), ("num_samples", num_samples)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{name}={number}: expected a whole number >= 1")
    check_nonnegative("epsilon", epsilon)
    if not (_is_finite(scale) and scale > 0):
        raise UserError(f"scale={scale}: expected a finite number > 0")


def check_steps(edges: Sequence[float] | Tensor, gammas: Sequence[float] | Tensor) -> None:
    """Raises UserError unless there are ascending edges in [0, 1] and one gamma more."""
    if isinstance(edges, Tensor) or isinstance(gammas, Tensor):
        return  # of a module, which has checked them
    if not all(_is_finite(g) for g in gammas) or len(gammas) != len(edges) + 1:
        raise UserError(f"gammas={gammas}: expected {len(edges) + 1} finite numbers, one a step")
    if not all(_is_finite(e) and 0 <= e <= 1 for e in edges) or sorted(edges) != list(edges):
        raise UserError(f"edges={edges}: expected ascending probabilities")


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
    with autocast_off(probabilities.device.type):
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
    if heatmap.numel() == 0 or not (can_read(heatmap) and can_read(probabilities)):
        return
    for name, tensor in (("probabilities range", probabilities), ("the heatmap ranges", heatmap)):
        low, high = _bounds(tensor.detach())
        if not 0 <= low <= high <= 1:  # also when NaN
            raise UserError(f"{name} from {low:.4g} to {high:.4g}: expected 0 to 1")


def _bounds(tensor: Tensor) -> tuple[float, float]:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()  # torch 2.1 has no aminmax of them
    low, high = torch.aminmax(tensor)
    return low.item(), high.item()


def noised_topk_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int,
    epsilon: float,
    num_samples: int = 5,
    use_sigmoid: bool = False,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Noised top-K hinge loss.

    .. math::
        L = \max(0,\, 1 + \mathrm{top}_{K+1,\epsilon}(s) - s_y), \qquad
        \mathrm{top}_{k,\epsilon}(s) = \frac1B \sum_b (s + \epsilon Z_b)_{[k]}, \; Z_b \sim N(0, I)

    with (.)_[k] the k-th largest of all classes, y among them. The gradient is the perturbed
    optimizer's: that of top is the mean over the B copies of the one-hot vector of the class at
    rank K + 1. No tensor of the size N x C x B is made.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module;
            softmax form's shapes with integer labels, more than k columns.
        k: K >= 1, the label should be among the K largest scores.
        epsilon: of the noise, in the scores' unit, >= 0; 0 is the hinge without smoothing.
        num_samples: B >= 1.
        use_sigmoid: must be False.
        generator: of the noise, on the logits' device; None for torch's own.
        noise: (N, C, B) in the place of drawing.

    Source: Garcin et al., Stochastic smoothing of the top-K calibrated hinge loss (2022), the
        balanced loss.
    """
    return imbalanced_noised_topk_loss(
        logits,
        target,
        weight,
        k=k,
        epsilon=epsilon,
        margins=None,
        scale=1.0,
        num_samples=num_samples,
        use_sigmoid=use_sigmoid,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        avg_factor=avg_factor,
        generator=generator,
        noise=noise,
    )


def imbalanced_noised_topk_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int,
    epsilon: float,
    margins: Sequence[float] | Tensor | None,
    scale: float = 50.0,
    num_samples: int = 5,
    use_sigmoid: bool = False,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Noised top-K hinge loss with a margin a class.

    .. math:: L = \max(0,\, S\,(m_y + \mathrm{top}_{K+1,\epsilon}(s) - s_y))

    Args:
        logits, target, weight, k, epsilon, num_samples, use_sigmoid, class_weight, ignore_index,
            reduction, avg_factor, generator, noise: as in :func:`noised_topk_loss`.
        margins: m, one >= 0 a column, see :func:`topk_margins`; with one fewer than there are
            columns the last column is background and gets the smallest margin, that of the most
            frequent class. None for 1 everywhere.
        scale: S > 0. 50 is meant for scores that are cosines; with others use 1.

    Source: Garcin et al. (2022), the imbalanced loss.
    """
    check_topk(k, epsilon, num_samples, scale)
    check_form("noised top-K loss", use_sigmoid, False)
    if margins is not None:
        _check_per_class("margins", margins, high=math.inf)

    def rows(scores: Tensor, labels: Tensor) -> Tensor:
        columns = scores.shape[1]
        if columns <= k:
            raise UserError(
                f"k={k} with logits of {columns} columns: the noised top-K loss needs at least"
                f" {k + 1}, since it compares with the class at rank k + 1"
            )
        expected = (*scores.shape, num_samples)
        if noise is not None and noise.shape != expected:
            raise UserError(f"noise has shape {tuple(noise.shape)}: expected {expected}")
        margin: Tensor | float = 1.0
        if margins is not None:
            table = torch.as_tensor(margins, dtype=scores.dtype, device=scores.device)
            if len(table) == columns - 1:
                table = torch.cat([table, table.amin(dim=0, keepdim=True)])
            if len(table) != columns:
                raise UserError(
                    f"{len(table)} class counts (margins) for logits of {columns} columns: expected"
                    f" {columns}, or {columns - 1} if the last column is background"
                )
            margin = table[labels]
        gap = noised_gap(scores, labels, k + 1, epsilon, num_samples, generator, noise)
        return torch.relu(scale * (margin + gap))

    return _of_rows(
        "the noised top-K loss",
        rows,
        logits,
        target,
        weight,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
    )


def topk_margins(class_counts: Sequence[float] | Tensor, max_margin: float) -> Tensor:
    r"""Margins of the imbalanced noised top-K loss, :math:`m_y = C / n_y^{1/4}`.

    C is such that the rarest class has ``max_margin``. A class without a sample has that margin
    too, and takes no part in choosing C.

    Args:
        class_counts: n, samples of each class, >= 0, one of them above 0.
        max_margin: > 0.

    Returns:
        float32, one a class.

    Source: Garcin et al. (2022), after Cao et al., LDAM (2019).
    """
    if not (_is_finite(max_margin) and max_margin > 0):
        raise UserError(f"max_margin={max_margin}: expected a finite number > 0")
    _check_per_class("class_counts", class_counts, high=math.inf)
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.dim() != 1 or not (counts > 0).any():
        raise UserError("class_counts: expected one number a class, one of them above 0")
    rarest = counts[counts > 0].min()
    return (max_margin * (rarest / counts.clamp_min(rarest)) ** 0.25).float()


def debiased_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = None,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Debiased focal loss, :math:`-\alpha_t (1 - p^B_t)^\gamma \log p_t`.

    p^B_t is the probability that a model which sees the bias only gives to the target: what the
    bias explains weighs little. Where ``bias_logits`` has a gradient, ``bias_weight`` times the
    cross-entropy of the bias model is added, and the gradient of the first term reaches it too.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module.
        bias_logits: the bias model's, of the logits' shape; logarithms of probabilities will do in
            the softmax form.
        use_sigmoid, gamma, alpha: as in :func:`focal_loss`.
        bias_weight: lambda_h >= 0.
        theta: annealing, in [0, 1]: p^B is replaced by the normalised p^B to the power theta.

    Source: Karimi Mahabadi et al., End-to-End Bias Mitigation by Modelling Biases in Corpora
        (2020), debiased focal loss.
    """
    check_nonnegative("gamma", gamma)
    bias = _check_bias(bias_logits, logits, theta)
    soft = _check_input(logits, target, use_sigmoid, ignore_index)
    modulator = _bias_miss(theta * bias, target, use_sigmoid, soft, ignore_index)
    if gamma != 1:
        # A power below 1 has no finite slope at 0.
        modulator = modulator.clamp_min(torch.finfo(modulator.dtype).tiny) ** gamma
    common = (class_weight, ignore_index, reduction, avg_factor)
    weighted = _times(weight, modulator, logits, use_sigmoid)
    loss = _loss(logits, target, weighted, PolyFocal(), use_sigmoid, alpha, *common)
    return loss + _bias_training([bias], bias_weight, target, weight, use_sigmoid, common)


def product_of_experts(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    use_sigmoid: bool,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Product of experts: cross-entropy of :math:`\mathrm{softmax}(\log p + \log p^B)`.

    The model learns what the bias does not say already; at test time it is used without it. In
    the sigmoid form the two log-odds are added.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, bias_weight, theta, class_weight,
            ignore_index, reduction, avg_factor: as in :func:`debiased_focal_loss`.

    Source: Clark et al. (2019); Karimi Mahabadi et al. (2020); Utama et al., Towards Debiasing NLU
        Models from Unknown Biases (2020).
    """
    bias = _check_bias(bias_logits, logits, theta)
    common = (class_weight, ignore_index, reduction, avg_factor)
    if not use_sigmoid:
        bias = torch.log_softmax(bias, dim=1)
    both = logits.to(bias.dtype) + theta * bias
    loss = _loss(both, target, weight, PolyFocal(), use_sigmoid, None, *common)
    return loss + _bias_training([bias], bias_weight, target, weight, use_sigmoid, common)


def reweighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    use_sigmoid: bool,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Cross-entropy with the weights :math:`w_i = (1 - p^B_t)^\theta` over their mean.

    So that the mean over a batch is :math:`\sum_i w_i CE_i / \sum_i w_i`. The weights have no
    gradient.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, bias_weight, class_weight,
            ignore_index, reduction, avg_factor: as in :func:`debiased_focal_loss`.
        theta: annealing, in [0, 1]: the power of the weights.

    Source: Utama et al. (2020), example reweighting, and its code for the annealing.
    """
    bias = _check_bias(bias_logits, logits, theta)
    soft = _check_input(logits, target, use_sigmoid, ignore_index)
    miss = _bias_miss(bias.detach(), target, use_sigmoid, soft, ignore_index) ** theta
    counted = miss
    if ignore_index is not None and not soft:
        counted = miss[target != ignore_index]
    if counted.numel():
        miss = miss / counted.mean().clamp_min(torch.finfo(miss.dtype).tiny)
    common = (class_weight, ignore_index, reduction, avg_factor)
    weighted = _times(weight, miss, logits, use_sigmoid)
    loss = _loss(logits, target, weighted, PolyFocal(), use_sigmoid, None, *common)
    return loss + _bias_training([bias], bias_weight, target, weight, use_sigmoid, common)


def confidence_regularization(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    teacher_logits: Tensor,
    use_sigmoid: bool,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Confidence regularisation: distillation from a teacher that the bias makes less sure.

    .. math::
        L = -\sum_j q_j \log p_j, \qquad q_j = \frac{t_j^w}{\sum_k t_k^w}, \qquad w = 1 - p^B_t

    with t the teacher's probabilities; in the sigmoid form for every class against its
    complement. q has no gradient.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, theta, class_weight, ignore_index,
            reduction, avg_factor: as in :func:`debiased_focal_loss`; ``class_weight`` weighs by q
            in the softmax form.
        teacher_logits: of the logits' shape. Where it has a gradient it is trained as the bias
            model is.
        bias_weight: of both of their cross-entropies, >= 0.

    Source: Utama et al., Mind the Trade-off: Debiasing NLU Models without Degrading the
        In-distribution Performance (2020).
    """
    bias = _check_bias(bias_logits, logits, theta)
    teacher = _check_bias(teacher_logits, logits, 1.0, "teacher_logits")
    soft = _check_input(logits, target, use_sigmoid, ignore_index)
    w = _bias_miss((theta * bias).detach(), target, use_sigmoid, soft, ignore_index)
    own_weight, own_factor = weight, avg_factor
    if ignore_index is not None and not soft:
        keep = target != ignore_index
        shown = keep.unsqueeze(1).expand_as(logits) if use_sigmoid else keep
        own_weight = _times(weight, shown.to(w.dtype), logits, use_sigmoid)
        if reduction == "mean" and avg_factor is None:
            own_factor = shown.sum().clamp_min(1)
    if use_sigmoid:
        quiet = torch.sigmoid(w * teacher.detach())
    else:
        quiet = torch.softmax(w.unsqueeze(1) * torch.log_softmax(teacher.detach(), dim=1), dim=1)
    loss = _loss(
        logits,
        quiet,
        own_weight,
        PolyFocal(),
        use_sigmoid,
        None,
        class_weight,
        None,
        reduction,
        own_factor,
    )
    common = (class_weight, ignore_index, reduction, avg_factor)
    return loss + _bias_training([bias, teacher], bias_weight, target, weight, use_sigmoid, common)


def dual_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float,
    use_sigmoid: bool = False,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Dual focal loss, :math:`-(1 - p_y + p_j)^\gamma \log p_y`.

    p_j is the largest probability below p_y, 0 if there is none. Focal loss alone makes a model
    too modest where it made it modest enough; p_j keeps the gap to the next class in view.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module;
            softmax form with integer labels.
        gamma: >= 0; 0 is cross-entropy.
        use_sigmoid: must be False.

    Source: Tao et al., Dual Focal Loss for Calibration (2023).
    """
    check_nonnegative("gamma", gamma)
    check_form("dual focal loss", use_sigmoid, False)

    def rows(x: Tensor, labels: Tensor) -> Tensor:
        log_p = torch.log_softmax(x, dim=1)
        log_py = log_p.gather(1, labels.unsqueeze(1))
        lower = log_p.masked_fill(log_p >= log_py, -math.inf)
        below = lower.amax(dim=1) if x.shape[0] else lower.sum(dim=1)
        log_py = log_py.squeeze(1)
        # 1 - p_y from the logits, so that it is exact next to 0; see debiased_focal_loss of the
        # bound.
        base = -torch.expm1(log_py) + torch.exp(below)
        return -(base.clamp_min(torch.finfo(x.dtype).tiny) ** gamma) * log_py

    return _of_rows(
        "the dual focal loss",
        rows,
        logits,
        target,
        weight,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
    )


def stepped_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    edges: Sequence[float] | Tensor,
    gammas: Sequence[float] | Tensor,
    use_sigmoid: bool,
    alpha: PerClass | None = None,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Focal loss whose gamma is a step function of p_t.

    .. math::
        L = -\alpha_t (1 - p_t)^{\gamma(p_t)} \log p_t \;(\gamma \ge 0), \qquad
        L = -\alpha_t (1 + p_t)^{|\gamma(p_t)|} \log p_t \;(\gamma < 0)

    gamma is gammas[i] where edges[i - 1] <= p_t < edges[i], and is a constant for the gradient.
    ``edges=(0.2, 0.5), gammas=(5, 3, 3)`` is FLSD-53; AdaFocal chooses both while it trains.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see the module;
            integer labels.
        edges: E ascending probabilities.
        gammas: E + 1 finite numbers.
        use_sigmoid, alpha: as in :func:`focal_loss`.

    Source: Mukhoti et al., Calibrating Deep Neural Networks using Focal Loss (2020), FLSD-53;
        Ghosh et al., AdaFocal (2022), for gammas below 0.
    """
    check_alpha(alpha)
    check_steps(edges, gammas)

    def each(z: Tensor, alpha_t: Tensor | float) -> Tensor:
        log_pt, log_miss = F.logsigmoid(z), F.logsigmoid(-z)
        step = torch.as_tensor(edges, dtype=z.dtype, device=z.device)
        table = torch.as_tensor(gammas, dtype=z.dtype, device=z.device)
        p_t = torch.exp(log_pt.detach())
        gamma = table[torch.bucketize(p_t, step, right=True)]
        # The side of torch.where that is not taken must be finite too, for its gradient.
        modulator = torch.where(
            gamma < 0,
            torch.exp(gamma.abs() * torch.log1p(torch.exp(log_pt))),
            torch.exp(gamma.clamp_min(0) * log_miss),
        )
        return -alpha_t * modulator * log_pt

    def rows(x: Tensor, labels: Tensor) -> Tensor:
        a = _per_class("alpha", alpha, x, x.shape[1], x.dtype)
        if not use_sigmoid:
            return each(softmax_margin(x, labels), 1.0 if a is None else at_class(a, labels))
        positive = labels.unsqueeze(1) == torch.arange(x.shape[1], device=x.device)
        alpha_t = 1.0 if a is None else torch.where(positive, a, 1.0 - a)
        return each(torch.where(positive, x, -x), alpha_t)

    return _of_rows(
        "the stepped focal loss",
        rows,
        logits,
        target,
        weight,
        class_weight,
        ignore_index,
        reduction,
        avg_factor,
        use_sigmoid,
    )


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
    with autocast_off(logits.device.type):
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


def _of_rows(
    name: str,
    rows: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Sequence[float] | Tensor | None,
    ignore_index: int | None,
    reduction: str,
    avg_factor: Tensor | float | None,
    use_sigmoid: bool = False,
) -> Tensor:
    """As :func:`_loss`, for a loss of labels that ``rows`` composes of torch operations."""
    check_reduction(reduction, avg_factor)
    check_class_weight(class_weight)
    if _check_input(logits, target, use_sigmoid, ignore_index):
        raise UserError(
            f"got targets of the logits' shape {tuple(target.shape)}: {name} takes integer labels"
            " (N,)"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    with autocast_off(logits.device.type):
        keep = None
        if ignore_index is not None:
            keep = target != ignore_index
            target = torch.where(keep, target, 0)
        loss = rows(logits.to(dtype), target)
        shape = loss.shape
        per_class = _per_class("class_weight", class_weight, logits, logits.shape[1], dtype)
        if isinstance(per_class, Tensor):
            loss = loss * (per_class if use_sigmoid else per_class[target])
        if weight is not None:
            loss = loss * expand_weight(weight, shape, dtype)
        if keep is not None:
            loss = loss * (keep.unsqueeze(1) if use_sigmoid else keep)
        if reduction == "none":
            return loss
        scale = mean_scale(shape, keep, avg_factor, dtype) if reduction == "mean" else 1.0
        return loss.sum() * scale


def _check_bias(
    bias_logits: Tensor, logits: Tensor, theta: float, name: str = "bias_logits"
) -> Tensor:
    """The bias model's logits, in the dtype of the loss."""
    if not (_is_finite(theta) and 0 <= theta <= 1):
        raise UserError(f"theta={theta}: expected a number in [0, 1]")
    if bias_logits.shape != logits.shape or not bias_logits.is_floating_point():
        raise UserError(
            f"{name} {tuple(bias_logits.shape)} {bias_logits.dtype} for logits"
            f" {tuple(logits.shape)}: expected floating point of the same shape"
        )
    return bias_logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def _bias_miss(
    bias: Tensor, target: Tensor, use_sigmoid: bool, soft: bool, ignore_index: int | None
) -> Tensor:
    """1 - p^B_t: (N, C) in the sigmoid form, else (N,)."""
    if soft:
        p = torch.sigmoid(bias) if use_sigmoid else torch.softmax(bias, dim=1)
        p_t = target * p + (1.0 - target) * (1.0 - p) if use_sigmoid else (target * p).sum(dim=1)
        return 1.0 - p_t
    if ignore_index is not None:
        target = torch.where(target != ignore_index, target, 0)
    if not use_sigmoid:
        return torch.sigmoid(-softmax_margin(bias, target))
    positive = target.unsqueeze(1) == torch.arange(bias.shape[1], device=bias.device)
    return torch.sigmoid(torch.where(positive, -bias, bias))


def _times(weight: Tensor | None, factor: Tensor, logits: Tensor, use_sigmoid: bool) -> Tensor:
    if weight is None:
        return factor
    return expand_weight(
        weight, logits.shape if use_sigmoid else logits.shape[:1], factor.dtype
    ) * (factor)


def _bias_training(
    models: list[Tensor],
    bias_weight: float,
    target: Tensor,
    weight: Tensor | None,
    use_sigmoid: bool,
    common: tuple[Any, ...],
) -> Tensor | float:
    """The cross-entropies of the bias models that are trained together with the main one."""
    check_nonnegative("bias_weight", bias_weight)
    if bias_weight == 0:
        return 0.0
    return sum(
        bias_weight * _loss(bias, target, weight, PolyFocal(), use_sigmoid, None, *common)
        for bias in models
        if bias.requires_grad
    )


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
    if target.numel() == 0 or not can_read(target):
        return soft
    low, high = _bounds(target)
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
