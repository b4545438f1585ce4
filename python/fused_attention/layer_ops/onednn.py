"""bfloat16 linear layers on CPUs: oneDNN's product with the bias and the activation in the same pass.

F.linear runs the same product, but first copies the bias into every row of the result; the activation is another pass then.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .choice import heard, untouched

# The names of oneDNN's: of the activation, and of its algorithm.
NAMES = {None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}

LEAST_FLOPS = 2e8  # below, the copy of the bias stays in the cache and costs nothing


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether the operator computes this call; it has no derivative, and compilers choose it by themselves."""
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or activation not in NAMES or torch.compiler.is_compiling():
        return False
    if not untouched(x, weight, bias) or heard(x, weight, bias):
        return False
    if weight.dim() != 2 or (bias is None and activation is None) or 2 * x.numel() * weight.shape[0] < LEAST_FLOPS:
        return False
    return bool(torch._C._get_mkldnn_enabled()) and _available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x weight' + bias); x: (..., in)."""
    name, algorithm = NAMES[activation]
    if bias is not None:
        bias = bias.contiguous()  # whose stride it does not ask for
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
    return out


@functools.cache
def _available() -> bool:
    """An operator of PyTorch's own compiler, so no part of its public surface: it may be missing, or the CPU too old for it."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    supported = getattr(operators, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
