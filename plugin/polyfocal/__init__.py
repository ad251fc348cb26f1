"""polyfocal: the focal-loss family for MMDetection, MMDetection3D and Detectron2.

Importing this package imports torch and nothing of the detection frameworks; their adapters are
``polyfocal.mmengine``, ``polyfocal.mmdet``, ``polyfocal.mmdet3d`` and ``polyfocal.detectron2``.
"""

import sys
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "swap"]

# The doctor looks at environments whose torch may be missing or broken.
if not (sys.argv[:1] == ["-m"] and "polyfocal.doctor" in sys.orig_argv):
    from polyfocal import losses
    from polyfocal.losses import *  # noqa: F403
    from polyfocal.swapping import swap

    __all__ += sorted(losses.LOSSES)

    def __getattr__(name: str) -> Any:
        """A loss that was defined elsewhere, since."""
        try:
            return losses.LOSSES[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
