"""Calibrated scores at test time."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner

from polyfocal.calibration.posthoc import Calibrator
from polyfocal.registry import HOOKS


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class CalibrateScoresHook(Hook):
    """Gives every prediction of validation and test the scores of a fitted calibrator.

    The scores in ``pred_instances`` change before the metrics and the visualizer see them; the
    boxes, their order and the checkpoint stay as they are. The classes' names come from the data
    set.

    Args:
        file: What ``tools/calibration.py --save`` wrote.

    Raises:
        UserError: The file is no calibrator.

    Example:
        >>> custom_hooks = [dict(type="polyfocal.CalibrateScoresHook", file="calibrator.json")]
    """

    def __init__(self, file: str) -> None:
        self.calibrator = Calibrator.load(file)
        self._handle: Any = None

    def before_val(self, runner: Runner) -> None:
        self._start(runner, runner.val_dataloader.dataset)

    def after_val(self, runner: Runner) -> None:
        self._stop()

    def before_test(self, runner: Runner) -> None:
        self._start(runner, runner.test_dataloader.dataset)

    def after_test(self, runner: Runner) -> None:
        self._stop()

    def _start(self, runner: Runner, dataset: Any) -> None:
        names = dataset.metainfo["classes"]

        # The loops' own hooks come after the metrics have taken the predictions.
        def rewrite(module: torch.nn.Module, args: Any, predictions: Any) -> None:
            for sample in predictions:
                instances = sample.pred_instances
                labels = instances.labels.tolist()
                scores = self.calibrator.apply(
                    instances.scores.detach().double().cpu().numpy(), [names[i] for i in labels]
                )
                instances.scores = torch.from_numpy(scores).to(instances.scores)

        self._stop()
        self._handle = runner.model.register_forward_hook(rewrite)

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
