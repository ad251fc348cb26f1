"""What a loss sees during training, class by class."""

from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss
from polyfocal.mmengine.registry import HOOKS


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class ClassStatisticsHook(Hook):
    """Logs the positives of every class, and the mean p_t of them, that each loss has seen.

    Every ``interval`` iterations the MessageHub gets, for each loss of this package in the model
    (in the order of ``model.named_modules()``) and each class c,
    ``train/<module>/positives_<c>`` and, where there were positives,
    ``train/<module>/p_t_<c>``, over the iterations since the last time. The logger and the
    visualizer show them with everything else under ``train/``. Between those iterations nothing
    is copied from the device. Only integer labels are counted.

    Args:
        interval: iterations between two records, >= 1.

    Example:
        >>> custom_hooks = [dict(type='polyfocal.ClassStatisticsHook', interval=50)]
    """

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise UserError(f"ClassStatisticsHook has interval={interval}: expected >= 1")
        self.interval = interval
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._counts = True

    def before_train(self, runner: Any) -> None:
        for name, module in runner.model.named_modules():
            if isinstance(module, ClassificationLoss):
                # MMEngine adds every key with "loss" to the total, so the name must not hold it.
                parts = name.removeprefix("module.").split(".")
                name = ".".join(part.replace("loss_", "") for part in parts if part != "loss")
                handle = module.register_forward_hook(partial(self._count, name), with_kwargs=True)
                self._handles.append(handle)

    def _count(
        self, name: str, module: ClassificationLoss, args: tuple, kwargs: dict, _: Tensor
    ) -> None:
        pred = (args[0] if args else kwargs["pred"]).detach()
        target = args[1] if len(args) > 1 else kwargs["target"]
        if isinstance(target, tuple | list):  # labels and the overlaps that the scores shall have
            target = target[0]
        if target.shape == pred.shape or not (self._counts and torch.is_grad_enabled()):
            return
        columns = pred.shape[1]
        positive = (target >= 0) & (target < columns)
        if module.ignore_index is not None:
            positive &= target != module.ignore_index
        label = torch.where(positive, target, 0).long()
        if getattr(module, "activated", False):
            p = pred.float()
        else:
            p = pred.float().sigmoid() if module.use_sigmoid else pred.float().softmax(dim=1)
        p_t = p.gather(1, label.unsqueeze(1)).reshape(-1)
        seen, label = positive.float().reshape(-1), label.reshape(-1)  # rows, or a map of labels
        if name not in self._sums:
            self._sums[name] = seen.new_zeros(2, columns)
        self._sums[name].index_add_(1, label, torch.stack([seen, seen * p_t]))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._counts = True

    def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
        self._counts = False  # CurvatureHook, for example, asks for the loss too
        if not self.every_n_train_iters(runner, self.interval):
            return
        for name, sums in self._sums.items():
            for c, (count, p_t) in enumerate(sums.t().tolist()):
                runner.message_hub.update_scalar(f"train/{name}/positives_{c}", count)
                if count:
                    runner.message_hub.update_scalar(f"train/{name}/p_t_{c}", p_t / count)
        self._sums.clear()

    def after_train(self, runner: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
