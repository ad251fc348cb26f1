"""A config of MMEngine's under a search: the settings of its loss, its length, its variants."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import MODELS, DefaultScope

from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.request import Setting, Watcher
from polyfocal.losses import Range
from polyfocal.mmengine.configs import class_of, is_new_style, read_config, type_name


class WatcherHook(Hook):
    """Tells a watcher how a training goes."""

    priority = "VERY_LOW"

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        self.watcher.step()

    after_val_iter = after_train_iter

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        found = {name.split("/")[-1]: value for name, value in (metrics or {}).items()}
        self.watcher.evaluated(runner.epoch, found)


def losses_of(model: Any) -> dict[str, ConfigDict]:
    """A classifier's loss, or the classification losses of a detector's heads.

    Args:
        model: Of a config.

    Returns:
        Their configs, by the options that override them, such as ``model.bbox_head.loss_cls``.

    Raises:
        UserError: There is none that is known here.
    """
    if isinstance(model.get("loss"), dict):
        return {"model.loss": model.loss}
    place, head = ("model.roi_head", model.roi_head) if "roi_head" in model else ("model", model)
    name = "bbox_head" if head.get("bbox_head") else "head"
    heads = head.get(name)
    places = {f"{place}.{name}": heads}
    if isinstance(heads, list):
        places = {f"{place}.{name}.{number}": one for number, one in enumerate(heads)}
    losses = {
        f"{place}.{key}": one[key]
        for place, one in places.items()
        for key in ("loss_cls", "loss")
        if one and key in one
    }
    if not losses:
        raise UserError(
            f"a {type_name(model)} has no classification loss that is known here: expected"
            " model.loss, or loss_cls in bbox_head."
        )
    return losses


def settings_of(cfg: Config) -> dict[str, Setting]:
    """What is worth a search in the loss of a config, by name.

    Raises:
        UserError: The main loss is none of this package.
    """
    scope = cfg.get("default_scope")
    nodes = _losses(cfg)
    kinds = sorted({type_name(node) for node in nodes})
    if len({class_of(node, MODELS, scope) for node in nodes}) > 1:
        raise UserError(
            f"{cfg.filename} has heads with different losses, {' and '.join(kinds)}: a search is "
            "for one."
        )
    try:
        with DefaultScope.overwrite_default_scope(scope):
            loss = MODELS.build(nodes[0])
    except Exception as error:  # a config can name any class and give it anything
        raise UserError(f"the loss of {cfg.filename} cannot be built: {error}") from error
    if not hasattr(loss, "tunable"):
        raise UserError(
            f"the classification loss of {cfg.filename} is {kinds[0]}, which declares nothing to "
            "search: expected one of polyfocal's, such as type='polyfocal.FocalLoss'."
        )
    found = {}
    for name, range_ in loss.tunable().items():
        value = _value(loss, nodes[0], name)
        # None and a number per class are decisions that a search for one number does not take.
        if not isinstance(value, int | float) or (range_.log and value <= 0):
            continue
        # The config's own value is the first trial: it is always within.
        low, high = min(range_.low, value), max(range_.high, value)
        found[name] = Setting(float(value), Range(low, high, range_.log))
    return found


def use_values(cfg: Config, values: Mapping[str, float]) -> None:
    """Give the classification loss of a config, in each of its heads, other settings, in place."""
    for loss in _losses(cfg) if values else ():
        for name, value in values.items():
            key, _, place = name.partition(".")
            if place:
                loss[key] = [value if j == int(place) else old for j, old in enumerate(loss[key])]
            else:
                loss[key] = value


def epochs_of(cfg: Config) -> int:
    """How long a training is.

    Raises:
        UserError: It does not count in epochs.
    """
    whole = cfg.train_cfg.get("max_epochs")
    if whole is None:
        raise UserError(f"{cfg.filename} has no train_cfg.max_epochs: a trial is some epochs.")
    return whole


def use_epochs(cfg: Config, epochs: int) -> None:
    """Shorten a training, in place, its schedule with it; it is evaluated after every epoch."""
    share = epochs / cfg.train_cfg.max_epochs
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1, val_begin=1)
    schedulers = cfg.get("param_scheduler") or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if not scheduler.get("by_epoch", True):
            continue
        for key in ("end", "T_max"):
            if scheduler.get(key) is not None:
                scheduler[key] = max(1, round(share * scheduler[key]))
        if "begin" in scheduler:
            scheduler.begin = round(share * scheduler.begin)
        if "milestones" in scheduler:
            scheduler.milestones = [max(1, round(share * one)) for one in scheduler.milestones]
    # Nobody looks at the weights of a trial.
    cfg.default_hooks.checkpoint = ConfigDict(
        type="CheckpointHook", interval=-1, save_last=False, by_epoch=True
    )


def write_variant(
    file: Path, config: Path, values: Mapping[str, float], comment: Sequence[str]
) -> None:
    """Write a config that is another one with other settings of the loss.

    Args:
        file: To write.
        config: The ``_base_``; one of the new style is written out in full.
        values: Of the settings.
        comment: Paragraphs to begin with.
    """
    old, new = read_config(config), read_config(config)
    use_values(new, values)
    lines = [f"# {line}" for one in comment for line in textwrap.wrap(one, 98)]
    if is_new_style(old):  # which cannot be a _base_ of the old style
        text = new.pretty_text
    else:
        base = os.path.relpath(config.resolve(), file.parent.resolve())
        lines.append(f"_base_ = {Path(base).as_posix()!r}")
        changed = _changed(old.model.to_dict(), new.model.to_dict())
        text = Config({"model": changed}).pretty_text
    write_text(file, "\n".join(lines) + f"\n{text}")


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of a nested dictionary that are new; a list is replaced as a whole."""
    changed = {}
    for key, value in new.items():
        if key in old and isinstance(value, dict) and isinstance(old[key], dict):
            if deeper := _changed(old[key], value):
                changed[key] = deeper
        elif key not in old or old[key] != value:
            changed[key] = value
    return changed


def _losses(cfg: Config) -> list[ConfigDict]:
    """The classification losses of a config, without the adapters around them."""
    nodes = list(losses_of(cfg.model).values())
    return [node.loss if isinstance(node.get("loss"), dict) else node for node in nodes]


def _value(loss: Any, node: ConfigDict, name: str) -> Any:
    key, _, place = name.partition(".")
    value = getattr(loss, key, node.get(key))
    return value[int(place)] if place else value
