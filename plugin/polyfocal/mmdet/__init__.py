"""MMDetection adapter. Importing it registers the losses and what heads need around them.

``custom_imports=dict(imports=['polyfocal.mmdet'])`` makes ``type='Poly1FocalLoss'`` work in any
config; ``type='polyfocal.Poly1FocalLoss'`` works without it.
"""

from polyfocal.distributions import refuse_rivals
from polyfocal.errors import PackageError

try:
    refuse_rivals()
    import mmcv  # noqa: F401
    import mmdet  # noqa: F401
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("mmdet", "mmcv", "mmengine"):
        raise
    raise PackageError(
        f"polyfocal.mmdet needs MMDetection, and {error.name} is not installed: pip install"
        " 'polyfocal[mmdet]', after torch and mmcv as the README says"
    ) from None

import polyfocal.mmengine  # noqa: F401
from polyfocal.mmdet import placement
from polyfocal.mmdet.bias import BiasHeadHook, attach_bias_heads
from polyfocal.mmdet.calibration import CalibrateScoresHook
from polyfocal.mmdet.datasets import CocoDataset
from polyfocal.mmdet.frozen import BlankPicture, FrozenFeaturesHook
from polyfocal.mmdet.heads import MaskLoss, RoILoss
from polyfocal.mmdet.metrics import CalibrationMetric, CocoMetric
from polyfocal.mmdet.soft_labels import SoftLabelsHook
from polyfocal.mmdet.thresholds import DrawAboveThresholdsHook

placement.watch()

__all__ = [
    "BiasHeadHook",
    "BlankPicture",
    "CalibrateScoresHook",
    "CalibrationMetric",
    "CocoDataset",
    "CocoMetric",
    "DrawAboveThresholdsHook",
    "FrozenFeaturesHook",
    "MaskLoss",
    "RoILoss",
    "SoftLabelsHook",
    "attach_bias_heads",
]
