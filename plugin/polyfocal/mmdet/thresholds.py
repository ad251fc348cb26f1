"""Pictures of the detections above the score threshold of their class."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.engine.hooks import DetVisualizationHook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner

from polyfocal.calibration.thresholds import Thresholds
from polyfocal.mmengine.registry import HOOKS


@HOOKS.register_module()
@MMENGINE_HOOKS.register_module()
class DrawAboveThresholdsHook(DetVisualizationHook):
    """MMDetection's ``DetVisualizationHook`` with a score threshold for each class.

    The metrics get all detections, as before.

    Args:
        thresholds: File that ``polyfocal calibration --thresholds`` wrote.
        **kwargs: Arguments of MMDetection's hook; ``score_thr`` has no effect.

    Raises:
        UserError: The file holds no thresholds.

    Example:
        >>> default_hooks = dict(visualization=dict(
        ...     type="polyfocal.DrawAboveThresholdsHook", thresholds="thresholds.json", draw=True))
    """

    def __init__(self, thresholds: str, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "score_thr": 0.0})
        self.thresholds = Thresholds.load(thresholds)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[Any]
    ) -> None:
        if self.draw:
            outputs = self._above(outputs, runner.val_dataloader.dataset)
            super().after_val_iter(runner, batch_idx, data_batch, outputs)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[Any]
    ) -> None:
        if self.draw:
            outputs = self._above(outputs, runner.test_dataloader.dataset)
            super().after_test_iter(runner, batch_idx, data_batch, outputs)

    def _above(self, outputs: Sequence[Any], dataset: Any) -> list[Any]:
        classes = dataset.metainfo["classes"]
        drawn = []
        for sample in outputs:
            instances = sample.pred_instances
            names = [classes[label] for label in instances.labels.tolist()]
            kept = torch.from_numpy(self.thresholds.kept(instances.scores, names))
            copy = sample.new()
            copy.pred_instances = instances[kept.to(instances.scores.device)]
            drawn.append(copy)
        return drawn
