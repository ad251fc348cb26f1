"""Refuses, while a model is built, a loss in a head that would silently train something else.

A head assigns its loss to an attribute, and torch tells a module registration hook about that. The
hook sees the head and the loss together, at the only moment when both are known and nothing has
run. :mod:`polyfocal.heads` says what each head of MMDetection and MMDetection3D hands over.
"""

import warnings

from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from polyfocal import heads
from polyfocal.errors import UserError

_watching: RemovableHandle | None = None
_warned: set[tuple[type, str]] = set()


def watch() -> None:
    """From now on, :func:`check` sees every loss of this package when a head takes it."""
    global _watching
    if _watching is None:
        _watching = register_module_module_registration_hook(check)


def check(head: nn.Module, name: str, loss: nn.Module | None) -> None:
    """Raises UserError if ``head.<name> = loss`` would build a wrong model.

    A head that is not in the table of heads gives a warning. For a Mask R-CNN this checks
    ``Shared2FCBBoxHead.loss_cls`` and ``FCNMaskHead.loss_mask``.

    Args:
        head: the module that takes the loss.
        name: the name of the attribute.
        loss: the value of the attribute; anything but a loss of this package passes.
    """
    if loss is None or heads.family(loss) is None:
        return
    slot = heads.slot_of(type(head), name)
    if slot is None and not isinstance(head, BaseModule):
        return  # an adapter, or somebody's own model
    # VFNetHead keeps the focal loss of its other form under the same name.
    without_vfl = slot is not None and slot.kind == "quality matrix" and not head.use_vfl
    kind = "labels" if slot is None or without_vfl else slot.kind
    if kind == "labels or qualities" and getattr(head, "as_two_stage", False):
        kind = "sigmoid labels or qualities"
    if slot is not None or heads.is_known(type(head)):
        reason = heads.misplaced(type(head), name, loss, heads.KINDS[kind])
        if reason is not None:
            raise UserError(reason)
    expected = getattr(head, "use_sigmoid_cls", None)
    found = getattr(loss, "use_sigmoid", None)
    if name == "loss_cls" and None not in (expected, found) and expected != found:
        raise UserError(
            f"{type(head).__name__}.{name} is a {type(loss).__name__} with use_sigmoid={found}, but"
            f" the head was made for use_sigmoid={expected}: write use_sigmoid={expected} in the"
            " loss's config, where the head reads it"
        )
    _warn_of_unknown(type(head), name, slot)


def _warn_of_unknown(head: type, name: str, slot: heads.Slot | None) -> None:
    ours = head.__module__.startswith("polyfocal.")
    if ours or (slot is not None and heads.is_known(head)) or (head, name) in _warned:
        return
    _warned.add((head, name))
    if slot is None:
        assumed = heads.KINDS["labels"].gives
    else:
        assumed = f"what {slot.head}.{slot.name} gets, {heads.KINDS[slot.kind].gives}"
    warnings.warn(
        f"polyfocal does not know {head.__module__}.{head.__name__}.{name}: it is assumed to give"
        f" its loss {assumed}. If it does not, something else is trained; docs/heads.md has the"
        " heads that are known",
        stacklevel=5,
    )
