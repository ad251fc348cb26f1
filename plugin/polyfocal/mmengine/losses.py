"""The losses as MMEngine knows them."""

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.logging import MessageHub
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.mmengine.registry import MODELS


class RunnerProgress:
    """Makes a :class:`~polyfocal.losses.ScheduledLoss` follow MMEngine's Runner by itself.

    The progress is ``iter / (max_iters - 1)`` of the current MessageHub, where the Runner
    publishes both for epoch-based and iteration-based training, after a resume too. Nothing is
    stored in the module, so that copies of it (EMA) and replicas (DistributedDataParallel) agree.
    ``set_progress`` takes precedence.
    """

    _progress: float | None

    def progress(self) -> float:
        """The part of the training that is done.

        Raises:
            UserError: no Runner has published it and nobody has set it.
        """
        if self._progress is not None:
            return self._progress
        hub = MessageHub.get_current_instance()
        iteration, max_iters = hub.get_info("iter"), hub.get_info("max_iters")
        if iteration is None or max_iters is None:
            raise UserError(
                f"{type(self).__name__} finds no training progress in MMEngine's MessageHub: train"
                " with MMEngine's Runner, or call set_progress(iteration / max(1, max_iterations -"
                " 1)) on the loss before each step"
            )
        return iteration / max(1, max_iters - 1)


def class_counts(source: Any) -> list[int]:
    """Samples of each class, in the order of the labels.

    Args:
        source: path of a COCO (or LVIS) annotation file, of which crowds are left out; or a data
            set with ``get_cat_ids(index)``, as MMDetection's and MMPretrain's have it, or with
            ``targets``, as torchvision's have it.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(source, str | Path):
        from polyfocal.coco import class_counts as of_file

        return of_file(source)
    if hasattr(source, "get_cat_ids"):
        labels = [int(c) for index in range(len(source)) for c in source.get_cat_ids(index)]
    elif hasattr(source, "targets"):
        labels = [int(label) for label in source.targets]
    else:
        raise UserError(
            f"class_counts of a {type(source).__name__}: expected the path of a COCO file, or a"
            " data set with get_cat_ids(index) or targets"
        )
    counted = Counter(labels)
    names = (getattr(source, "metainfo", None) or {}).get("classes") or ()
    return [counted[label] for label in range(max(len(names), max(counted, default=-1) + 1))]


def _resolved(name: str, value: Any) -> Any:
    """A setting as the loss wants it, from what a config can hold."""
    if name in ("bias", "teacher") and isinstance(value, dict):
        return MODELS.build(value)
    if name == "class_counts" and isinstance(value, str | Path):
        return class_counts(value)
    return value


def _configurable(cls: type[nn.Module]) -> Any:
    """The class for configs: takes dictionaries and paths, and follows the Runner's progress."""
    original: Callable[..., None] = cls.__init__

    # The keywords stay those of the class: the message about a misspelt keyword lists them.
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        original(self, *args, **{name: _resolved(name, v) for name, v in settings.items()})

    bases = (RunnerProgress, cls) if issubclass(cls, losses.ScheduledLoss) else (cls,)
    described = {"__doc__": cls.__doc__, "__module__": __name__, "__init__": __init__}
    keywords = {"table": False} if issubclass(cls, losses.Loss) else {}
    made = types.new_class(cls.__name__, bases, keywords, lambda body: body.update(described))
    globals()[cls.__name__] = made  # where pickle looks for the class
    return made


def _register(cls: type[nn.Module]) -> None:
    """Puts a loss or a source of bias scores in the registries.

    The losses of this package go in the root registry too: with
    custom_imports=dict(imports=['polyfocal.mmdet']) every OpenMMLab scope finds the bare name. If
    the framework has a class of that name, such as mmdet's FocalLoss, that class comes first;
    polyfocal.FocalLoss always means the loss of this package. A loss that was defined elsewhere is
    polyfocal.NAME; its bare name is left to its author.
    """
    keywords = inspect.signature(cls).parameters
    needs = {"bias", "teacher", "class_counts"} & keywords.keys()
    module = _configurable(cls) if needs or issubclass(cls, losses.ScheduledLoss) else cls
    MODELS.register_module(name=cls.__name__, module=module, force=True)
    if cls.__module__.startswith("polyfocal."):
        MMENGINE_MODELS.register_module(name=cls.__name__, module=module)


for _source in (losses.ClassPriors, losses.BiasHead, losses.StoredScores):
    _register(_source)
losses.LOSSES.follow(_register)
