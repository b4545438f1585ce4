"""What the host can tell without waiting for a device: the values of a vector in its own memory, and whether a CUDA graph is captured."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import ORDINARY


def seen_values(tensor: Tensor) -> list[int] | None:
    """The values of a vector in the host's memory, None where the host would have to wait for them."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) not in ORDINARY:
        return None
    values: list[int] = tensor.tolist()
    return values


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
