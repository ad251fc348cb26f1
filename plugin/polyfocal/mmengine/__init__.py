"""MMEngine adapter: the losses in its registry, and the training progress from its MessageHub."""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise ImportError(
        "polyfocal.mmengine needs MMEngine, which is not installed: pip install 'polyfocal[mmdet]'"
    ) from None

from polyfocal.mmengine.losses import CyclicalFocalLoss
from polyfocal.mmengine.statistics import ClassStatisticsHook

__all__ = ["ClassStatisticsHook", "CyclicalFocalLoss"]
