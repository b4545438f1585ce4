"""The activations of a feed-forward network by name: what they do to a tensor in plain PyTorch, and what the kernels call them.

relu, gelu, gelu_tanh, silu   act(x)
swiglu, geglu                 act(gate) · value of x = [gate | value]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """act, how many parts of a row it joins into one, and its name and its number among the kernels'."""

    function: Callable[[Tensor], Tensor]
    parts: int
    kernel: str
    number: int  # of enum class Activation in csrc/layers.h


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": Activation(torch.relu, 1, "relu", 1),
    "gelu": Activation(F.gelu, 1, "gelu", 2),
    "gelu_tanh": Activation(_gelu_tanh, 1, "gelu_tanh", 3),
    "silu": Activation(F.silu, 1, "silu", 4),
    "swiglu": Activation(F.silu, 2, "silu", 4),
    "geglu": Activation(F.gelu, 2, "gelu", 2),
}
GATED = tuple(name for name, activation in ACTIVATIONS.items() if activation.parts == 2)


def check_activation(name: str | None) -> None:
    """Raises ValueError for a name that is none of ours."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected None or one of {', '.join(map(repr, ACTIVATIONS))}")


def apply_activation(x: Tensor, name: str | None) -> Tensor:
    if name is None:
        return x
    activation = ACTIVATIONS[name]
    if activation.parts == 1:
        return activation.function(x)
    if x.shape[-1] % 2:
        raise ValueError(f"{name} was given rows of {x.shape[-1]} elements: it halves them, so their number must be even")
    gate, value = x.chunk(2, -1)
    return activation.function(gate) * value
