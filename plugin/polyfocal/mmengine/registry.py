"""Child registries of MMEngine's registries, where the adapters register ``polyfocal.X``."""

from collections.abc import Callable
from typing import ClassVar

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import Registry


class _Registry(Registry):
    """A registry that imports the adapters before it looks up a name."""

    doors: ClassVar[list[Callable[[], None]]] = []

    def import_from_location(self) -> None:
        for door in self.doors:
            door()


def before_a_look(door: Callable[[], None]) -> None:
    """Have ``door`` called before a name is looked up; it imports the installed adapters."""
    _Registry.doors.append(door)


MODELS = _Registry("model", parent=MMENGINE_MODELS, scope="polyfocal")
DATASETS = _Registry("dataset", parent=MMENGINE_DATASETS, scope="polyfocal")
HOOKS = _Registry("hook", parent=MMENGINE_HOOKS, scope="polyfocal")
METRICS = _Registry("metric", parent=MMENGINE_METRICS, scope="polyfocal")
TRANSFORMS = _Registry("transform", parent=MMENGINE_TRANSFORMS, scope="polyfocal")
VISBACKENDS = _Registry("vis_backend", parent=MMENGINE_VISBACKENDS, scope="polyfocal")
