"""What torch calls differently, or has not, in the versions from 2.1 to the newest.

Every name of torch that 2.1 lacks, and every private one, is asked for here and nowhere else.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Public since 2.3; torch.compile replaces either by True.
is_compiling: Callable[[], bool] = getattr(
    torch.compiler, "is_compiling", torch._utils.is_compiling
)


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, on devices that have none too."""
    asked = getattr(torch.amp, "is_autocast_available", None)  # since 2.4
    known = asked(device) if asked else device in ("cpu", "cuda", "xpu")
    return torch.autocast(device, enabled=False) if known else nullcontext()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is data in memory, on which functions without a derivative may work.

    False while torch.compile looks on, inside the transforms of torch.func, with a forward
    derivative, and for tensors without data.
    """
    return not (
        is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def can_read(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and is_plain(tensor)
