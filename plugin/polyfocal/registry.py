"""The door for MMEngine, which imports ``polyfocal.registry`` when it meets ``type='polyfocal.X'``.

It is above the adapters and imports those whose framework is installed, so that a config needs no
``custom_imports``.
"""

import sys
from importlib.util import find_spec

from polyfocal.mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS, before_a_look

__all__ = ["DATASETS", "HOOKS", "METRICS", "MODELS", "TRANSFORMS"]


def _bring_in_adapters() -> None:
    import polyfocal.classification

    if find_spec("mmdet"):
        import polyfocal.mmdet
    if "mmdet3d.registry" in sys.modules:  # importing what is not in use would cost seconds
        import polyfocal.mmdet3d  # noqa: F401


before_a_look(_bring_in_adapters)
