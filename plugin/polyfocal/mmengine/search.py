"""What a search and a study need of a config of MMEngine's: its losses, and who watches."""

from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook

from polyfocal.errors import UserError
from polyfocal.experiments.request import Watcher
from polyfocal.mmengine.configs import type_name


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
        model: The model of a config.

    Returns:
        Their configs, by the options that override them, such as ``model.bbox_head.loss_cls``.

    Raises:
        UserError: There is no such loss.
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


def changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of a nested dictionary that are new; a list is replaced as a whole."""
    found = {}
    for key, value in new.items():
        if key in old and isinstance(value, dict) and isinstance(old[key], dict):
            if deeper := changed(old[key], value):
                found[key] = deeper
        elif key not in old or old[key] != value:
            found[key] = value
    return found


def innermost_losses(cfg: Config) -> dict[str, ConfigDict]:
    """The classification losses of a config as :func:`losses_of` finds them, without adapters."""
    found = {}
    for place, node in losses_of(cfg.model).items():
        if isinstance(node.get("loss"), dict):
            found[f"{place}.loss"] = node.loss
        else:
            found[place] = node
    return found


def value_of(loss: Any, node: ConfigDict, name: str) -> Any:
    """A setting of a loss, by its name in :meth:`polyfocal.losses.Loss.tunable`."""
    key, _, place = name.partition(".")
    value = getattr(loss, key, node.get(key))
    return value[int(place)] if place else value
