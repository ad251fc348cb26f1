"""A config's dictionaries: walked through, and asked which class they would build.

A ``type`` is a name, with or without its scope, a dotted path, or, in configs of the new style, the
class itself. Only :func:`class_of` knows this; everything else compares classes.
"""

import contextlib
import copy
import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyObject
from mmengine.registry import MODELS, Registry

from polyfocal import losses
from polyfocal.errors import UserError

SCOPE_KEY = "_scope_"


def class_of(node: Mapping[str, Any], registry: Registry, scope: str | None) -> type | None:
    """The class that a dictionary of a config would build.

    Args:
        node: A dictionary, with or without a ``type``.
        registry: The registry of MMEngine in which such names are looked up.
        scope: The config's ``default_scope``.

    Returns:
        The class; None if there is no such class or no type.
    """
    kind = node.get("type")
    if isinstance(kind, str):
        # A base of another package (mmdet::...) leaves its scope in each dictionary.
        with registry.switch_scope_and_registry(node.get(SCOPE_KEY, scope)) as own:
            kind = own.get(kind)
    return kind if isinstance(kind, type) else None


def is_a(node: Any, registry: Registry, scope: str | None, bases: type | tuple[type, ...]) -> bool:
    """Whether a dictionary of a config would build one of some classes; see :func:`class_of`."""
    kind = class_of(node, registry, scope) if isinstance(node, dict) else None
    return kind is not None and issubclass(kind, bases)


def type_name(node: Mapping[str, Any]) -> str:
    """How a message calls a dictionary's ``type``: the name of the class, without the scope."""
    kind: Any = node.get("type")
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def walk(node: Any) -> Iterator[ConfigDict]:
    """Every dictionary in a config tree, the outermost first."""
    return (found for _, found in places(node, ""))


def places(node: Any, place: str) -> Iterator[tuple[str, ConfigDict]]:
    """:func:`walk` with the place of each dictionary, as ``--cfg-options`` write it."""
    if isinstance(node, dict):
        yield place, node
        for key, value in list(node.items()):
            yield from places(value, f"{place}.{key}")
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from places(value, f"{place}.{number}")


def leaf_datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets that read annotations, inside the wrappers of the config."""
    return (node for node in walk(dataset) if "ann_file" in node)


def annotation_file(dataset: ConfigDict) -> str:
    """The annotation file of a data set in a config."""
    return os.path.join(dataset.get("data_root") or "", dataset.ann_file)


def evaluators(cfg: Config, split: str) -> list[ConfigDict]:
    """The metrics of ``"val"`` or ``"test"``: a config has one or a list of them, or none."""
    found = cfg.get(f"{split}_evaluator") or []
    if not isinstance(found, list | tuple):
        # MMEngine's Evaluator may be written out, around its metrics.
        found = found.get("metrics", found)
    return list(found) if isinstance(found, list | tuple) else [found]


def set_evaluators(cfg: Config, split: str, metrics: list[ConfigDict]) -> None:
    """Give a config other metrics, in the form in which it has them."""
    found = cfg.get(f"{split}_evaluator")
    if isinstance(found, dict) and "metrics" in found:
        found["metrics"] = metrics
    else:
        cfg[f"{split}_evaluator"] = metrics[0] if len(metrics) == 1 else metrics


def without_weights(cfg: Config) -> list[str]:
    """Take the weights of a config, its ``load_from``, from a model that a profile has changed.

    Returns:
        What a person should know, a sentence or none.
    """
    file = cfg.get("load_from")
    if not file:
        return []
    cfg.load_from = None
    return [f"load_from={file} of the config is left out: the profile has another model."]


def _loaded(path: str | Path) -> Config:
    """A config, all of whose types can be imported."""
    if not Path(path).is_file():
        raise UserError(f"there is no config {path}.")
    try:
        cfg = Config.fromfile(path)
        # Looking at a dictionary imports the classes that it names.
        for node in walk([cfg[key] for key in cfg if key not in _imported(cfg)]):
            _settle_type(node)
    except Exception as error:  # a config is a program: it can fail in any way
        if "mmdet3d is not installed" in str(error):
            raise UserError(
                f"{path} is a config of MMDetection3D, which is not installed: run `make setup-3d`."
            ) from error
        text = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read as a config: {type(error).__name__}: {text}."
        ) from error
    return cfg


def content_of(path: str | Path) -> str:
    """A hash of what a config says, with its bases.

    Raises:
        UserError: As :func:`read_config`.
    """
    return hashlib.sha256(read_config(path).pretty_text.encode()).hexdigest()


def read_config(path: str | Path) -> Config:
    """A config, of the old style or the new one, all of whose types can be imported.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    cfg = _loaded(path)
    missing = [key for key in ("model", "train_dataloader", "val_dataloader") if key not in cfg]
    if missing:
        raise UserError(f"{path} is not the config of a detector: it has no {missing[0]!r}.")
    return cfg


def losses_in(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of the losses of this package in a config's model, each once.

    MMDetection's FocalLoss counts as the one of this package, which gives the same numbers.

    Raises:
        UserError: The file is no config, or has no such loss.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for node in walk(_loaded(path).get("model")):
        kind: Any = node.get("type")
        scope = (kind.__module__ if isinstance(kind, type) else str(kind)).partition(".")
        settings = {k: v for k, v in node.items() if k not in ("type", SCOPE_KEY)}
        one = (type_name(node), settings)
        ours = scope[0] in ("polyfocal", "mmdet") or not scope[1]
        if ours and one[0] in losses.LOSSES.of_logits() and one not in found:
            found.append(one)
    if not found:
        raise UserError(
            f"{path} has no loss of this package; plain cross-entropy is --loss "
            "Poly1CrossEntropyLoss epsilon=0"
        )
    return found


def framework_of(cfg: Config) -> str:
    """What a config is for: ``"mmdet3d"``, ``"classification"`` or ``"mmdet"``."""
    scope = cfg.get("default_scope")
    if scope in ("mmdet3d", "mmengine"):
        return "mmdet3d" if scope == "mmdet3d" else "classification"
    # In a config of the new style, the model's class says what the config is for.
    model = class_of(cfg.model, MODELS, scope)
    for base in model.__mro__ if model else ():
        for module, framework in (
            ("polyfocal.classification.", "classification"),
            ("mmdet3d.", "mmdet3d"),
        ):
            if base.__module__.startswith(module):
                return framework
    return "mmdet"


def is_new_style(cfg: Config) -> bool:
    """Whether a config was written with imports instead of names."""
    return bool(_imported(cfg))


def _imported(cfg: Config) -> set[str]:
    return getattr(cfg, "_imported_names", set())


def _settle_type(node: ConfigDict) -> None:
    """Make a type mean the same, however it is written.

    A loss that is imported from ``polyfocal`` becomes the class that its name has in the registry:
    the class that follows the Runner's progress and builds bias models. A dotted path, as MMEngine
    writes classes into the config of a run, becomes an import. MMEngine itself would follow
    attributes, where ``mmdet.models.losses.smooth_l1_loss`` is a function.
    """
    kind = node.get("type")
    if isinstance(kind, type) and getattr(losses, type_name(node), None) is kind:
        node.type = f"polyfocal.{type_name(node)}"
    elif isinstance(kind, str) and kind.count(".") > 1:
        module, _, name = kind.rpartition(".")
        with contextlib.suppress(ImportError):
            if hasattr(importlib.import_module(module), name):
                node.type = LazyObject(module, name)


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Override settings of a config, in place, such as ``{"train_cfg.max_epochs": 10}``.

    Raises:
        UserError: The config has no place for one of them.
    """
    try:
        # MMEngine may write one option into the value of another, so it gets copies.
        cfg.merge_from_dict(copy.deepcopy(dict(options)))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--cfg-options does not fit {cfg.filename}: {error}.") from error
