"""Confidence regularisation."""

from typing import Any, Optional, Union

import torch
from torch import Tensor

from polyfocal.losses.debiasing import (
    SETTINGS,
    BiasShared,
    DebiasingLoss,
    annealed,
    bias_miss,
    bias_rows,
    bias_training,
    checked_source,
)
from polyfocal.losses.rows import prepare, weighed_poly
from polyfocal.losses.settings import Common, Unpack, loss_function
from polyfocal.ops import PolyFocal


@loss_function(**SETTINGS)
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
    **common: Unpack[Common],
) -> Tensor:
    r"""Confidence regularisation: distillation from a teacher, flattened where the bias is sure.

    .. math::
        L = -\sum_j q_j \log p_j, \qquad q_j = \frac{t_j^w}{\sum_k t_k^w}, \qquad w = 1 - p^B_t

    with t the teacher's probabilities; in the sigmoid form for every class against its
    complement. q has no gradient.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, theta, class_weight, ignore_index,
            reduction, avg_factor: as in
            :func:`~polyfocal.losses.debiased_focal.debiased_focal_loss`; ``class_weight`` weighs by
            q in the softmax form.
        teacher_logits: logits of the teacher, in the shape of ``logits``.
        bias_weight: >= 0; also weighs the teacher's own cross-entropy if the teacher has a
            gradient.

    Source: Utama et al., Mind the Trade-off (2020).
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    bias = bias_rows(rows, logits, bias_logits)
    teacher = bias_rows(rows, logits, teacher_logits, "teacher_logits")
    w = bias_miss(rows, annealed(theta, bias).detach())
    if use_sigmoid:
        quiet = torch.sigmoid(w * teacher.detach())
    else:
        log_t = torch.log_softmax(teacher.detach(), dim=1)
        log_t = log_t.clamp_min(torch.finfo(log_t.dtype).min)  # so that 0 times it is 0
        quiet = torch.softmax(w.unsqueeze(1) * log_t, dim=1)
    loss = weighed_poly(rows._replace(target=quiet, soft=True), PolyFocal())
    return loss + bias_training(rows, bias_weight, bias, teacher)


class ConfidenceRegularizationLoss(DebiasingLoss):
    """Confidence regularisation, :func:`polyfocal.losses.functional.confidence_regularization`.

    ``loss(..., teacher_logits=t)`` gives the teacher's scores by hand; otherwise they come from
    ``teacher``.

    Args:
        teacher: a source of the teacher's scores, of the same kinds as ``bias``.
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`~polyfocal.losses.debiasing.DebiasingLoss`.
    """

    function = confidence_regularization
    monotone = False  # the target is the teacher's
    _inputs = ("bias_logits", "teacher_logits")

    def __init__(
        self,
        teacher: Any = None,
        use_sigmoid: bool | None = None,
        **shared: Unpack[BiasShared],
    ) -> None:
        super().__init__(use_sigmoid, **shared)
        self.teacher = checked_source(self, "teacher", teacher)

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
        bias_logits: Optional[Tensor] = None,
        teacher_logits: Optional[Tensor] = None,
    ) -> Tensor:
        """As in every loss, with the bias model's and the teacher's logits."""
        return self._weighed(
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            ignore_index,
            (bias_logits, teacher_logits),
        )
