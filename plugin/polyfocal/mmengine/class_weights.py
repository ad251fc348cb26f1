"""Weights and counts of classes from the data, in the configs of MMEngine's frameworks."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, DefaultScope

from polyfocal.data.coco import class_counts as counts_of_file
from polyfocal.errors import UserError
from polyfocal.losses import BiasSource, Loss
from polyfocal.losses.class_weights import use_counts, weighing
from polyfocal.losses.settings import BY_COUNTS, FROM_DATA, Numbers
from polyfocal.mmengine.configs import class_of, places, type_name
from polyfocal.mmengine.objects import is_empty, nothing_to_train_on, training_objects

# Their losses are of one class, or of the pixels of an object whose class is known.
_WITHOUT_CLASSES = {
    "rpn_head": "a proposal head",
    "mask_head": "a mask head",
    "loss_mask": "a loss of masks",
}
# Of a loss that is built and never computed, where the file is missing.
_NO_COUNTS = (1, 1)


def use_class_weights(
    cfg: Config,
    class_counts: Mapping[str, int] | None = None,
    *,
    train: bool = True,
    background: bool = True,
) -> list[str]:
    """Replace ``class_weight="balanced"``, ``class_counts="train.json"`` and the like by numbers.

    ``class_weight`` and ``alpha`` of each loss of the model may be ``"balanced"``, ``"effective"``,
    ``"sqrt"`` or ``dict(method="effective", beta=0.999)``; see
    :mod:`polyfocal.losses.class_weights`. ``class_counts`` of a loss or of its bias model may be
    the path of a COCO file. The tools do this when they prepare a training, so that the config it
    leaves has the numbers; your own train script calls it before it builds its Runner.

    Args:
        cfg: Changed in place; nothing is read or built if nothing asks for it.
        class_counts: Training samples by class; None for the objects that the built training data
            set has, without crowds and those to ignore.
        train: Whether the loss is computed. If not, such weights become None, no data set is
            built, and a file of counts may be missing.
        background: Whether the last column of a softmax loss is the background, as in detectors.

    Returns:
        A sentence for each weight or alpha, which says the numbers.

    Raises:
        UserError: No such method, a place without classes, data that do not tell their objects, or
            a file of counts that cannot be read.
    """
    scope = cfg.get("default_scope")
    sentences = []
    for place, node in places(cfg.model, "model"):
        kind = class_of(node, MODELS, scope)
        file = node.get("class_counts")
        if isinstance(file, str | Path) and kind and issubclass(kind, Loss | BiasSource):
            missing = not train and not Path(file).exists()
            node.class_counts = _NO_COUNTS if missing else counts_of_file(file)
        asked = [name for name in FROM_DATA if _asks(place, node, name, kind)]
        if not asked:
            continue
        for part, what in _WITHOUT_CLASSES.items():
            if part in place.split("."):
                raise UserError(
                    f"{place}.{asked[0]} asks for weights by class from the data, and {what} does"
                    " not tell classes apart: write numbers"
                )
        if train and class_counts is None:
            class_counts = _count(cfg)
        use_sigmoid = _use_sigmoid(node, kind)
        sentences += use_counts(
            node,
            place,
            class_counts if train else None,
            use_sigmoid=use_sigmoid,
            background=background and not use_sigmoid,
        )
    return sentences


def _asks(place: str, node: ConfigDict, name: str, kind: type | None) -> bool:
    """Whether a setting asks for numbers from the data, which only losses of this package may."""
    value = node.get(name)
    if kind is not None and issubclass(kind, Loss) and isinstance(kind.settings.get(name), Numbers):
        return weighing(name, value) is not None
    if isinstance(value, str) and value in BY_COUNTS:
        raise UserError(
            f"{place}.{name}={value!r} is for the losses of polyfocal with one {name} per class,"
            f" and {place} is a {type_name(node)}"
        )
    return False


def _use_sigmoid(node: ConfigDict, kind: Any) -> bool:
    default = inspect.signature(kind).parameters.get("use_sigmoid")
    return bool(node.get("use_sigmoid", default.default if default else True))


def _count(cfg: Config) -> dict[str, int]:
    """Objects of each class that a training will see, asked of its data set."""
    dataset = cfg.train_dataloader.dataset
    # MMDetection3D logs a table of its classes, as it does again when the training is built.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
            found = training_objects(DATASETS.build(copy.deepcopy(dataset)))
    except Exception as error:  # a data set that drops all of its pictures, in MMEngine
        if is_empty(cfg):
            raise nothing_to_train_on(cfg) from error
        raise
    finally:
        logger.setLevel(level)
    if found is None:
        raise UserError(
            f"weights by class are asked for, and the training data set, a {type_name(dataset)},"
            " does not tell the classes of its objects: write numbers, one per class"
        )
    if not any(found.counts.values()):
        raise nothing_to_train_on(cfg)
    return found.counts
