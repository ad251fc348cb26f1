"""MMEngine adapter: the losses in its registry, and the training progress from its MessageHub.

Importing it also lets torch >= 2.6 read MMEngine's checkpoints with its ``weights_only`` check on.
"""

from polyfocal.distributions import refuse_rivals
from polyfocal.errors import PackageError

try:
    refuse_rivals()
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise PackageError(
        "polyfocal.mmengine needs MMEngine, which is not installed: pip install 'polyfocal[mmdet]'"
    ) from None

from polyfocal.mmengine.checkpoint import allow_mmengine_checkpoints
from polyfocal.mmengine.class_weights import use_class_weights
from polyfocal.mmengine.curvature import CurvatureHook, TracePenaltyHook
from polyfocal.mmengine.hooks import (
    AdaFocalHook,
    ExactResumeHook,
    StoredScoresHook,
    StoreScoresHook,
)
from polyfocal.mmengine.logs import MLflowVisBackend
from polyfocal.mmengine.losses import class_counts
from polyfocal.mmengine.statistics import ClassStatisticsHook

allow_mmengine_checkpoints()

__all__ = [
    "AdaFocalHook",
    "ClassStatisticsHook",
    "CurvatureHook",
    "ExactResumeHook",
    "MLflowVisBackend",
    "StoreScoresHook",
    "StoredScoresHook",
    "TracePenaltyHook",
    "class_counts",
    "use_class_weights",
]
