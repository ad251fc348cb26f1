"""The polynomial focal family: one scalar formula and its gradient, and the composed operations.

With p_t the probability of the target and CE = -log p_t,

    f(p_t) = [(1 - xi) (1 - p_t)^gamma + xi (1 + p_t)^gamma_hc] CE
             + sum_j epsilon_j (1 - p_t)^(gamma + j)

One variable serves both activations: p_t = sigmoid(z), where z is the signed logit in the sigmoid
form and z = x_y - logsumexp_{k != y} x_k in the softmax form. With q = 1 - p_t, dq/dz = -p_t q and
dCE/dz = -q, so that the gradient is

    -df/dz = q^gamma [(1 - xi) (q + gamma p_t CE) + p_t sum_j (gamma + j) epsilon_j q^j]
             + xi (1 + p_t)^gamma_hc q [1 - gamma_hc CE p_t / (1 + p_t)]

:func:`loss_of` is f and :func:`slope_of` is -df/dz, both computed from CE, q and q^gamma, which
every pass gets in its own way; :func:`rate_of` is -df/dz divided by q. The composed operations take
them from ``logsigmoid``, exact in either tail, with powers as exponentials of logarithms, so that
autograd's gradient is finite for gamma < 1 too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfocal._torch import is_compiling


class PolyFocal(NamedTuple):
    """Coefficients of f(p_t); the defaults are cross-entropy."""

    gamma: float = 0.0
    epsilons: tuple[float, ...] = ()
    xi: float = 0.0
    gamma_hc: float = 0.0


def loss_of(
    poly: PolyFocal,
    cross_entropy: Tensor,
    q: Tensor,
    power: Tensor | None,
    p: Tensor | None = None,
    positive: Tensor | float = 1.0,
) -> Tensor:
    """f(p_t), elementwise.

    Args:
        poly: coefficients; numbers, or scalars of a compiled pass.
        cross_entropy: CE.
        q: 1 - p_t.
        power: q^gamma; None for 1.
        p: p_t, if it is known more exactly than as 1 - q.
        positive: scales xi.
    """
    high = poly.xi > 0
    xi = poly.xi * positive if high else 0.0
    loss = _plus(cross_entropy * (1.0 - xi) if high else cross_entropy, poly.epsilons, q)
    assert loss is not None
    if power is not None:
        loss = power * loss
    if high:
        p = 1.0 - q if p is None else p
        loss = loss + xi * (1.0 + p).pow(poly.gamma_hc) * cross_entropy
    return loss


def slope_of(
    poly: PolyFocal,
    cross_entropy: Tensor,
    q: Tensor,
    power: Tensor | None,
    factor: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """-df/dz times ``factor``, elementwise; finite, since no power below gamma occurs.

    Args:
        poly, cross_entropy, q, power: as in :func:`loss_of`.
        factor: a number.
        out: where to put the result.
    """
    kept = (1.0 - poly.xi) * factor
    slopes = [(poly.gamma + j + 1) * factor * e for j, e in enumerate(poly.epsilons)]
    inner = _plus(None if power is None else cross_entropy * (poly.gamma * kept), slopes, q)
    # kept q + p inner, with p = 1 - q
    slope = q * kept if inner is None else torch.lerp(inner, q.new_full((), kept), q)
    if power is not None:
        slope = torch.mul(power, slope, out=out)
    if poly.xi > 0:
        slope = slope + (poly.xi * factor) * _high_rate(poly, cross_entropy, 1.0 - q) * q
    return slope


def rate_of(poly: PolyFocal, cross_entropy: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """-df/dz divided by q, elementwise; with p = p_t, known more exactly than as 1 - q."""
    kept, gamma = 1.0 - poly.xi, poly.gamma
    slopes = [(gamma + j + 1) * e for j, e in enumerate(poly.epsilons)]
    # kept = kept (q + p), so that one number stands beside q and another one beside p.
    first = kept + slopes[0] if slopes else kept
    rate = torch.add(q if kept == 1.0 else q * kept, p, alpha=first)
    higher = _plus(None, slopes[1:], q)
    if higher is not None:
        rate = rate.addcmul_(p, higher)
    if gamma > 0:
        # q^gamma rate + gamma kept p q^(gamma - 1) CE
        base = q if gamma == 2 else q.clamp_min(torch.finfo(q.dtype).tiny).pow(gamma - 1.0)
        rate = (rate * q).addcmul_(p, cross_entropy, value=gamma * kept).mul_(base)
    if poly.xi > 0:
        rate = rate + poly.xi * _high_rate(poly, cross_entropy, p)
    return rate


def _high_rate(poly: PolyFocal, cross_entropy: Tensor, p: Tensor) -> Tensor:
    """(1 + p_t)^gamma_hc [1 - gamma_hc CE p_t / (1 + p_t)], the rate of the cycle's term."""
    above = 1.0 + p
    return above.pow(poly.gamma_hc) * (1.0 - poly.gamma_hc * p * cross_entropy / above)


def _plus(onto: Tensor | None, coefficients: Sequence[float], q: Tensor) -> Tensor | None:
    """``onto`` + sum_j c_j q^j, j from 1; None where there is nothing to add."""
    if onto is not None and len(coefficients) == 1 and not is_compiling():
        return torch.add(onto, q, alpha=coefficients[0])
    total: Tensor | None = None
    for coefficient in reversed(coefficients):
        total = coefficient * q if total is None else (total + coefficient) * q
    if onto is None or total is None:
        return total if onto is None else onto
    return onto + total


def margin_loss(poly: PolyFocal, z: Tensor) -> tuple[Tensor, Tensor]:
    """f(sigmoid(z)) and its derivative by z, elementwise."""
    below = -z
    q, cross_entropy = torch.sigmoid(below), softplus(below)
    power = q.pow(poly.gamma) if poly.gamma > 0 else None
    loss = loss_of(poly, cross_entropy, q, power)
    return loss, slope_of(poly, cross_entropy, q, power, factor=-1.0)


def _composed(
    poly: PolyFocal,
    cross_entropy: Tensor,
    log_pt: Tensor,
    log_miss: Tensor,
    positive: Tensor | float = 1.0,
) -> Tensor:
    """f(p_t), by differentiable operations on logarithms."""
    power = torch.exp(poly.gamma * log_miss) if poly.gamma > 0 else None
    return loss_of(poly, cross_entropy, torch.exp(log_miss), power, torch.exp(log_pt), positive)


def _of_margin(poly: PolyFocal, z: Tensor) -> Tensor:
    log_pt = F.logsigmoid(z)
    return _composed(poly, -log_pt, log_pt, F.logsigmoid(-z))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); x itself where that is the same in the precision of x."""
    return F.softplus(x, threshold=40 if x.dtype == torch.float64 else 20)


def composed_sigmoid(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    positive: Tensor | float,
    negative: Tensor | float,
    weight: Tensor | None,
) -> Tensor:
    """Weighted binary losses, one per entry, of differentiable operations.

    Args:
        logits: (N, C), or any shape with a target of that shape; float16 and bfloat16 are computed
            in float32.
        target: (N,) int64 in [0, C], C being background; or the logits' shape, in [0, 1].
        poly: coefficients.
        positive, negative: weights of the entries with target 1 and 0, a number or one per class.
        weight: broadcasts over the logits; None for 1.

    Returns:
        The logits' shape, float32 or float64.
    """
    logits = logits.to(compute_dtype(logits))
    if target.shape == logits.shape:
        loss = _sigmoid_soft(logits, target, poly) * (target * positive + (1.0 - target) * negative)
    else:
        # Nearly every entry is a negative: compute all as negatives, which the cycle does not
        # weigh, then put the positives in.
        loss = _of_margin(PolyFocal(poly.gamma, poly.epsilons), -logits) * negative
        if logits.shape[0] > 0:
            foreground = (target != logits.shape[1]).unsqueeze(1)
            column = torch.where(foreground, target.unsqueeze(1), 0)
            put = _of_margin(poly, logits.gather(1, column)) * at_class(positive, column)
            loss = loss.scatter(1, column, torch.where(foreground, put, loss.gather(1, column)))
    return loss if weight is None else loss * weight


def at_class(per_class: Tensor | float, labels: Tensor) -> Tensor | float:
    """The values of the labels' classes, in the shape of the labels; a number stays a number."""
    return per_class[labels] if isinstance(per_class, Tensor) and per_class.dim() else per_class


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return logits.dtype if logits.dtype == torch.float64 else torch.float32


def _sigmoid_soft(logits: Tensor, target: Tensor, poly: PolyFocal) -> Tensor:
    """Losses with target y in [0, 1]: p_t = y p + (1 - y)(1 - p), CE the binary cross-entropy."""
    log_p, log_1mp = F.logsigmoid(logits), F.logsigmoid(-logits)
    log_y, log_1my = torch.log(target), torch.log1p(-target)
    return _composed(
        poly,
        -(target * log_p + (1.0 - target) * log_1mp),
        _log_sum(log_y + log_p, log_1my + log_1mp),
        _log_sum(log_y + log_1mp, log_1my + log_p),
        positive=target,
    )


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b); its second derivative is finite where one of them is -inf, as torch's is not.

    So it is where they are more than 88 apart, in float32.
    """
    first = a >= b
    return torch.where(first, a, b) + F.softplus(torch.where(first, b - a, a - b))


def composed_softmax(
    logits: Tensor,
    target: Tensor,
    poly: PolyFocal,
    weight: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted single-label losses, one per row, of differentiable operations.

    Args:
        logits: (N, K); float16 and bfloat16 are computed in float32.
        target: (N,) int64 in [0, K - 1]; or (N, K) with rows that sum to 1.
        poly: coefficients.
        weight: (N,); None for 1.
        label_smoothing: mass spread evenly over the K classes, in [0, 1); integer targets only,
            and only where the source of the loss defines it (no epsilons beyond the first with
            gamma = 0, or the cyclical form).

    Returns:
        (N,)
    """
    logits = logits.to(compute_dtype(logits))
    if target.shape == logits.shape:
        loss = _softmax_soft(logits, target, poly)
    else:
        loss = _of_margin(poly, softmax_margin(logits, target))
        if label_smoothing > 0:
            loss = _smoothed(loss, logits, target, poly, label_smoothing)
    return loss if weight is None else loss * weight


def softmax_margin(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) z = x_y - logsumexp of the other logits."""
    column = target.unsqueeze(1)
    # The lowest finite number, not -inf: a single column then still has a finite gradient.
    others = logits.scatter(1, column, torch.finfo(logits.dtype).min)
    return logits.gather(1, column).squeeze(1) - torch.logsumexp(others, dim=1)


def _smoothed(
    loss: Tensor, logits: Tensor, target: Tensor, poly: PolyFocal, label_smoothing: float
) -> Tensor:
    # Every class k gets the mass a / K of a target; the labelled class gets (1 - a) more. The
    # weight of any other class is (1 - xi) p_k^gamma + xi, and its polynomial term is
    # epsilon (1 - p_k).
    share = label_smoothing / logits.shape[1]
    log_p = torch.log_softmax(logits, dim=1)
    smooth = -log_p
    if poly.gamma > 0:
        smooth = smooth * ((1.0 - poly.xi) * torch.exp(poly.gamma * log_p) + poly.xi)
    for epsilon in poly.epsilons:
        smooth = smooth + epsilon * -torch.expm1(log_p)
    smooth = smooth.scatter(1, target.unsqueeze(1), 0.0).sum(dim=1)
    return (1.0 - label_smoothing + share) * loss + share * smooth


def _softmax_soft(logits: Tensor, target: Tensor, poly: PolyFocal) -> Tensor:
    """Losses with p_t = sum_k y_k p_k and CE = -sum_k y_k log p_k."""
    log_p = torch.log_softmax(logits, dim=1)
    tiny = torch.finfo(logits.dtype).tiny
    p_t = (target * torch.exp(log_p)).sum(dim=1)
    one_minus_pt = (target * -torch.expm1(log_p)).sum(dim=1)
    return _composed(
        poly,
        -(target * log_p).sum(dim=1),
        torch.log(p_t.clamp_min(tiny)),
        torch.log(one_minus_pt.clamp_min(tiny)),
    )
