"""The Triton kernels of a layer on tensors of a GPU, as the registered operators call them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .activation import ACTIVATIONS


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    from fused_attention.triton_kernels.activation import bias_activation

    act = ACTIVATIONS[activation]
    out: Tensor = bias_activation(x, bias, activation=_name(act.kernel), gated=act.parts == 2)
    return out


def bias_activation_backward(dout: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """dx, and dbias, empty where there is no bias."""
    from fused_attention.triton_kernels.activation import bias_activation_backward

    act = ACTIVATIONS[activation]
    dx, dbias = bias_activation_backward(dout, x, bias, activation=_name(act.kernel), gated=act.parts == 2)
    return dx, x.new_empty(0) if dbias is None else dbias


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, summed (empty without a residual), mean (empty unless centred) and rstd."""
    from fused_attention.triton_kernels.norm import add_norm

    found = add_norm(x, residual, weight, bias, eps, kind="layer" if centred else "rms")
    nothing = x.new_empty(0)
    mean = found.rstd.new_empty(0) if found.mean is None else found.mean
    return found.out, nothing if residual is None else found.summed, mean, found.rstd


def add_norm_backward(
    dout: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two empty where there is no such vector."""
    from fused_attention.triton_kernels.norm import add_norm_backward

    dx, dweight, dbias = add_norm_backward(dout, dsummed, summed, weight, bias, mean, rstd)
    nothing = summed.new_empty(0)
    return dx, nothing if dweight is None else dweight, nothing if dbias is None else dbias


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    from fused_attention.triton_kernels.rotary import rotate

    out: Tensor = rotate(x, cos, sin, interleaved=interleaved, inverse=inverse)
    return out


def _name(kernel: str) -> Any:
    return kernel
