"""Tells the progress of the training to the losses that change with it."""

from detectron2.engine import HookBase

from polyfocal.losses import ScheduledLoss


class ProgressHook(HookBase):
    """Tells every scheduled loss of the trainer's model how much of the training is done.

    The progress is ``iter / (max_iter - 1)``, after a resume too. ``polyfocal train_detectron2``
    has it in every run; in another trainer it is one line.

    Example:
        >>> trainer.register_hooks([ProgressHook()])
    """

    def before_step(self) -> None:
        progress = self.trainer.iter / max(1, self.trainer.max_iter - 1)
        for module in self.trainer.model.modules():
            if isinstance(module, ScheduledLoss):
                module.set_progress(progress)
