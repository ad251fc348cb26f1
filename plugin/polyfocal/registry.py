"""Child registries of MMEngine's, so that ``type='polyfocal.X'`` needs no ``custom_imports``.

MMEngine imports ``<scope>.registry`` when it meets a scope that it does not know, and then the
locations named here.
"""

import importlib
import sys
from importlib.util import find_spec

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

_LOCATIONS = [
    "polyfocal.mmdet" if find_spec("mmdet") else "polyfocal.mmengine",
    "polyfocal.classification",
]


class _Registry(Registry):
    """A registry that knows the 3D adapter as soon as MMDetection3D is in use.

    Where that is installed but not used, importing it would cost every start some seconds.
    """

    def import_from_location(self) -> None:
        super().import_from_location()
        if "mmdet3d.registry" in sys.modules:
            importlib.import_module("polyfocal.mmdet3d")


MODELS = _Registry("model", parent=MMENGINE_MODELS, scope="polyfocal", locations=_LOCATIONS)
DATASETS = _Registry("dataset", parent=MMENGINE_DATASETS, scope="polyfocal", locations=_LOCATIONS)
HOOKS = _Registry("hook", parent=MMENGINE_HOOKS, scope="polyfocal", locations=_LOCATIONS)
METRICS = _Registry("metric", parent=MMENGINE_METRICS, scope="polyfocal", locations=_LOCATIONS)
