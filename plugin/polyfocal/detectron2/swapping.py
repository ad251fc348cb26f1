"""Swaps the classification losses of a LazyConfig; :mod:`polyfocal.swapping` calls it."""

import inspect
from typing import Any, NamedTuple

from detectron2.utils.registry import locate
from omegaconf import DictConfig

from polyfocal import heads, losses
from polyfocal.detectron2 import dense, rcnn
from polyfocal.detectron2.lazy_tree import walk
from polyfocal.detectron2.loss import build_loss
from polyfocal.errors import UserError
from polyfocal.losses.class_weights import from_data, no_alpha

_OURS = {
    cls.__name__: cls
    for cls in (
        dense.RetinaNet, dense.FCOS, rcnn.FastRCNNOutputLayers, rcnn.MaskRCNNConvUpsampleHead,
        rcnn.RPN,
    )
}  # fmt: skip
_SLOTS = {slot.head: slot for slot in heads.SLOTS if slot.framework == "detectron2"}
_MAIN = ("RetinaNet", "FCOS", "FastRCNNOutputLayers")
# The settings of the focal loss that Detectron2 has in its models, and what it has for them.
_FOCAL = {"gamma": ("focal_loss_gamma", 2.0), "alpha": ("focal_loss_alpha", 0.25)}


class Found(NamedTuple):
    """One class of a LazyConfig that classifies.

    Attributes:
        path: keys from the model to it.
        head: the name of Detectron2's class.
        cls: the class.
        loss: a dictionary with the ``type`` of its loss.
        slot: what the table of heads says.
    """

    path: tuple[str | int, ...]
    head: str
    cls: type
    loss: dict[str, Any]
    slot: heads.Slot

    @property
    def where(self) -> str:
        """The loss as an option names it: ``roi_heads.box_predictor.cls_loss``."""
        return ".".join(map(str, (*self.path, "cls_loss")))

    @property
    def decides(self) -> bool:
        """Whether it decides on classes: it is no mask and no proposal."""
        return self.head in _MAIN


def find_losses(model: DictConfig) -> list[Found]:
    """What classifies in a model, in the order of its config."""
    return [found for path, node in walk(model) if (found := _found(path, node))]


def _found(path: tuple[Any, ...], node: DictConfig) -> Found | None:
    cls = node.get("_target_")
    cls = locate(cls) if isinstance(cls, str) else cls
    head = next((k.__name__ for k in getattr(cls, "__mro__", ()) if k.__name__ in _SLOTS), None)
    if head is None:
        return None
    slot = _SLOTS[head]
    loss = node.get("cls_loss")
    kind = slot.stock if loss is None else type(loss)  # a built loss
    if isinstance(loss, DictConfig):
        kind = loss.get("_target_", loss.get("type"))
    kind = kind if isinstance(kind, str) else kind.__name__
    return Found(path, head, cls, {"type": kind.rpartition(".")[2]}, slot)


def changes(node: DictConfig, found: Found, loss: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a swap changes in the settings of a class.

    Args:
        node: the settings.
        found: the class.
        loss: as for :func:`polyfocal.swap`, and so are ``settings``.
    """
    ours = _OURS.get(found.head)
    if ours is None:
        kind = heads.KINDS[found.slot.kind]
        raise UserError(f"{found.where} gives {kind.gives}: take {kind.take}")
    if found.cls not in (ours, ours.__mro__[1]):
        raise UserError(
            f"{found.where}: {found.cls.__name__} is a class of its own below {found.head}: derive"
            f" it from polyfocal.detectron2.{found.head}, and give it a cls_loss"
        )
    if loss == "poly1" and found.loss["type"] in losses.__all__:
        raise UserError(
            f"{found.where} is a {found.loss['type']}, a loss of this package already: set its"
            " epsilon"
        )
    of_box = found.head == "FastRCNNOutputLayers"
    sigmoid = not of_box or bool(node.get("use_sigmoid_ce"))
    changed: dict[str, Any] = {} if found.cls is ours else {"_target_": ours}
    new: dict[str, Any] = {}
    if loss == "poly1":
        name = "Poly1FocalLoss" if found.head in ("RetinaNet", "FCOS") else "Poly1CrossEntropyLoss"
        settings = {"epsilon": 1.0, **settings}
    elif loss in losses.LOSSES:
        name = loss
    else:
        known = ", ".join(sorted(losses.LOSSES))
        raise UserError(f"loss={loss!r}: expected poly1 or one of {known}")
    takes = inspect.signature(losses.LOSSES[name]).parameters
    if found.loss["type"] == "sigmoid_focal_loss":
        for own, (key, default) in _FOCAL.items():
            value = node.get(key, default)
            if value != default:
                changed[key] = default  # beside a cls_loss it would have no effect
            if own == "alpha" and value < 0:
                value = None  # Detectron2's way to say it
            if own in takes and value != takes[own].default:
                new[own] = value
    if "use_sigmoid" in takes:
        softmax_only = takes["use_sigmoid"].default is False and name != "Poly1CrossEntropyLoss"
        new["use_sigmoid"] = sigmoid and not softmax_only
    new = {"type": f"polyfocal.{name}", **new, **settings}
    if "alpha" not in settings:
        new |= no_alpha(losses.LOSSES[name], new)
    numbers = {k: v for k, v in new.items() if k not in from_data(losses.LOSSES[name], new)}
    built = build_loss(numbers, found.head, needs_sigmoid=not of_box)
    if of_box and sigmoid and not built.use_sigmoid:
        raise UserError(
            f"{found.where} has use_sigmoid_ce=True, but {name} is of softmax form: take a loss"
            " with use_sigmoid=True, or set use_sigmoid_ce=False"
        )
    if of_box and built.use_sigmoid and found.cls is not ours and sigmoid:
        changed["prior_prob"] = 0.5  # the classes start as they did
    return changed | {"cls_loss": new}
