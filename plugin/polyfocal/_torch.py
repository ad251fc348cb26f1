"""What differs between torch's versions from 2.1 to the newest.

Every name of torch that 2.1 lacks, and every private name, is used only here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

# Public since 2.3; torch.compile replaces either by True.
is_compiling: Callable[[], bool] = getattr(
    torch.compiler, "is_compiling", torch._utils.is_compiling
)


_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Before 2.5 torch.compile takes an attribute of a module for a constant.
SEES_ATTRIBUTES = _VERSION >= (2, 5)
_F = TypeVar("_F", bound=Callable[..., Any])


def looked_up(function: _F) -> _F:
    """Keeps a function that reads what changes during a training out of a compiled graph.

    Where torch.compile sees the change by itself the function stays in.
    """
    return function if SEES_ATTRIBUTES else torch.compiler.disable(function)


_has_autocast: Callable[[str], bool] | None = getattr(
    torch.amp, "is_autocast_available", None
)  # since 2.4


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; False on devices that have none."""
    if _has_autocast is not None:
        # The graphs of 2.4 and 2.6 cannot hold the first question; 2.13's can.
        known = _VERSION < (2, 13) and is_compiling()
        return (known or _has_autocast(device)) and torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """A context without autocast; it also works on devices that have no autocast."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


_transforms = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is data in memory, on which functions without a derivative may work.

    False while torch.compile looks on, inside the transforms of torch.func, with a forward
    derivative, and for tensors without data.
    """
    return not (
        is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or _transforms() is not None
        or _forward_ad._current_level >= 0
    )


def can_read(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and is_plain(tensor)


# What a file of weights calls to make a tensor; the third version is younger than the others.
REBUILD_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"torch._utils.{name}": getattr(torch._utils, name)
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
    )
    if hasattr(torch._utils, name)
}


def allow_names(names: dict[str, Any]) -> None:
    """Put names on the allow-list of ``torch.load(weights_only=True)``, where that is the default.

    Before torch 2.6 nothing is done: its check is off by default, and takes no names or only the
    objects' own.

    Args:
        names: What ``module.name`` in a file stands for.
    """
    if _VERSION >= (2, 6):
        torch.serialization.add_safe_globals([(value, name) for name, value in names.items()])
