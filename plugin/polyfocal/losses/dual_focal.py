"""Dual focal loss."""

import math

import torch
from torch import Tensor

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import labels_only, prepare, weighed
from polyfocal.losses.settings import GAMMA, Common, Form, Shared, Unpack, loss_function
from polyfocal.ops.poly_focal import compute_dtype


@loss_function(gamma=GAMMA, use_sigmoid=Form(only=False, what="dual focal loss"))
def dual_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float,
    use_sigmoid: bool = False,
    **common: Unpack[Common],
) -> Tensor:
    r"""Dual focal loss, :math:`-(1 - p_y + p_j)^\gamma \log p_y`.

    p_j is the largest probability below p_y, 0 if there is none. Focal loss alone can make a model
    less confident than it should be; p_j takes the gap to the next class into account.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`; softmax form with integer labels.
        gamma: >= 0; 0 is cross-entropy.
        use_sigmoid: must be False.

    Source: Tao et al., Dual Focal Loss for Calibration (2023).
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    labels_only(rows, "the dual focal loss")
    x = rows.logits.to(compute_dtype(logits))
    log_p = torch.log_softmax(x, dim=1)
    log_py = log_p.gather(1, rows.target.unsqueeze(1))
    lower = log_p.masked_fill(log_p >= log_py, -math.inf)
    below = lower.amax(dim=1) if x.shape[0] else lower.sum(dim=1)
    log_py = log_py.squeeze(1)
    # 1 - p_y from the logits, so that it is exact next to 0; a power below 1 has no finite slope
    # at 0.
    base = -torch.expm1(log_py) + torch.exp(below)
    return weighed(rows, -(base.clamp_min(torch.finfo(x.dtype).tiny) ** gamma) * log_py)


class DualFocalLoss(ClassificationLoss):
    """Dual focal loss, :func:`polyfocal.losses.functional.dual_focal_loss`.

    Args:
        gamma: >= 0. It has no default, as in the author's code, where 0 is cross-entropy.
        use_sigmoid: False; the loss compares two classes of one softmax.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = dual_focal_loss
    soft_targets = False
    monotone = False  # p_j jumps when p_y overtakes a class

    def __init__(self, gamma: float, use_sigmoid: bool = False, **shared: Unpack[Shared]) -> None:
        super().__init__(use_sigmoid, gamma=gamma, **shared)
