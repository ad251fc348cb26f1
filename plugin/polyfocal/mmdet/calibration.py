"""Calibrated scores at test time."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner

from polyfocal.calibration.posthoc import Calibrator
from polyfocal.mmengine.registry import HOOKS


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class CalibrateScoresHook(Hook):
    """Gives every prediction of validation and test the scores of a fitted calibrator.

    The scores in ``pred_instances`` change before the metrics and the visualizer see them. The
    boxes, their order and the checkpoint stay as they are. The names of the classes come from the
    data set.

    Args:
        file: What ``polyfocal calibration --save`` wrote.

    Raises:
        UserError: The file is no calibrator.

    Example:
        >>> custom_hooks = [dict(type="polyfocal.CalibrateScoresHook", file="calibrator.json")]
    """

    def __init__(self, file: str) -> None:
        self.calibrator = Calibrator.load(file)

    def before_val(self, runner: Runner) -> None:
        self._wrap(runner.model, "val_step", runner.val_dataloader.dataset)

    def after_val(self, runner: Runner) -> None:
        del runner.model.val_step

    def before_test(self, runner: Runner) -> None:
        self._wrap(runner.model, "test_step", runner.test_dataloader.dataset)

    def after_test(self, runner: Runner) -> None:
        del runner.model.test_step

    def _wrap(self, model: torch.nn.Module, name: str, dataset: Any) -> None:
        # A hook is called after an iteration, when the metrics already have the predictions. So the
        # step is wrapped on the instance, and the wrapper removed afterwards. A distributed or
        # test-time augmentation wrapper is then calibrated as a whole.
        classes = dataset.metainfo["classes"]
        step = getattr(model, name)

        def calibrated(data: Any) -> Any:
            predictions = step(data)
            for sample in predictions:
                instances = sample.pred_instances
                scores = self.calibrator.apply(
                    instances.scores.detach().double().cpu().numpy(),
                    [classes[label] for label in instances.labels.tolist()],
                )
                instances.scores = torch.from_numpy(scores).to(instances.scores)
            return predictions

        setattr(model, name, calibrated)
