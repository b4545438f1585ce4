"""What torch.autocast does to attention: operands are cast once, and the arithmetic inside keeps the precision it chose."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cast(*operands: Any) -> tuple[Any, ...]:
    """The operands in autocast's dtype where it is on for their device, else as they are."""
    if not torch._C._is_any_autocast_enabled():
        return operands
    first = operands[0]
    if not isinstance(first, Tensor) or not _known(first.device) or not torch.is_autocast_enabled(first.device.type):
        return operands
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands)


def off(device: torch.device) -> AbstractContextManager[None]:
    """No autocast inside: accumulation stays in float32 or float64."""
    return torch.autocast(device.type, enabled=False) if _known(device) else nullcontext()


def _known(device: torch.device) -> bool:
    # Asking about autocast raises for devices that have none, such as meta.
    return torch.amp.is_autocast_available(device.type)
