"""Child registries of MMEngine's, so that ``type='polyfocal.X'`` needs no ``custom_imports``.

MMEngine imports ``<scope>.registry`` when it meets a scope that it does not know, and then the
locations named here.
"""

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

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="polyfocal", locations=_LOCATIONS)
HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope="polyfocal", locations=_LOCATIONS)
DATASETS = Registry("dataset", parent=MMENGINE_DATASETS, scope="polyfocal", locations=_LOCATIONS)
METRICS = Registry("metric", parent=MMENGINE_METRICS, scope="polyfocal", locations=_LOCATIONS)
