"""Cyclical focal loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.functional import PerClass
from polyfocal.losses.schedule import check_factor


class CyclicalFocalLoss(ClassificationLoss):
    """Cyclical focal loss, :func:`polyfocal.losses.functional.cyclical_focal_loss`.

    It needs to know how much of the training is done. An adapter of a framework reads that from
    the framework by overriding :meth:`progress`; in a training loop of one's own,
    :meth:`set_progress` says it.

    Args:
        gamma_hc: exponent of the high-confidence term, >= 0.
        gamma_lc: exponent of the low-confidence (focal) term, >= 0.
        factor: >= 1; see :func:`polyfocal.losses.schedule.cyclical_weight`.
        alpha: in [0, 1], one number or one a class. The default is 0.25 in the sigmoid form, as
            in the focal loss of dense heads, and none in the softmax form, as in the paper.
        label_smoothing: in [0, 1), softmax form.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        gamma_hc: float = 3.0,
        gamma_lc: float = 2.0,
        factor: float = 4.0,
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        if alpha is None and use_sigmoid:
            alpha = 0.25
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_nonnegative("gamma_hc", gamma_hc)
        functional.check_nonnegative("gamma_lc", gamma_lc)
        functional.check_label_smoothing(label_smoothing, bool(use_sigmoid))
        check_factor(factor)
        self.gamma_hc = gamma_hc
        self.gamma_lc = gamma_lc
        self.factor = factor
        self.label_smoothing = label_smoothing
        self._progress: float | None = None

    def set_progress(self, progress: float) -> None:
        """Says what part of the training is done, in [0, 1]; values outside are clamped."""
        self._progress = float(progress)

    def progress(self) -> float:
        """The part of the training that is done.

        Raises:
            UserError: nobody has said it.
        """
        if self._progress is None:
            raise UserError(
                "CyclicalFocalLoss does not know the training's progress: call"
                " set_progress(iteration / max(1, max_iterations - 1)) before each step, train with"
                " MMEngine's Runner, which publishes it, or register"
                " polyfocal.detectron2.ProgressHook() with Detectron2's trainer"
            )
        return self._progress

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.cyclical_focal_loss(
            pred,
            target,
            weight,
            progress=self.progress(),
            gamma_hc=self.gamma_hc,
            gamma_lc=self.gamma_lc,
            factor=self.factor,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            **common,
        )
