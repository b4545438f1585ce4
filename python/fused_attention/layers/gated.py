"""Gated activations of the feed-forward block: one half of linear1's output opens or shuts the other.

    swiglu(x) = silu(gate) · value,  geglu(x) = gelu(gate) · value,    x = [gate | value]

Source: Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
"""

from collections.abc import Callable

from torch import Tensor

from fused_attention.layer_ops import gated


def swiglu(x: Tensor) -> Tensor:
    """x: (..., 2 · width), the gates first; gives (..., width)."""
    return gated(x, activation="swiglu")


def geglu(x: Tensor) -> Tensor:
    """x: (..., 2 · width), the gates first; gives (..., width). GELU as by the error function."""
    return gated(x, activation="geglu")


GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "geglu": geglu}


def gated_name(activation: object) -> str | None:
    """The activation, if it is the name of a gated one."""
    return activation if isinstance(activation, str) and activation in GATED else None
