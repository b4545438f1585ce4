"""The modules of a layer as fused operators where nobody would notice: same parameters, same result, one pass over memory.

    linear_of(module, x, activation)     activation(module(x))
    add_norm_of(norm, x, block)          norm(x + block), and x + block

A module that a user may have changed is called as a module: one with hooks, of another class (parametrised, quantised, adapted), or with a
forward of its own.
"""

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_attention.layer_ops import add_norm, linear

from .gated import GATED
from .norms import RMSNorm


def own_forwards(*classes: type[nn.Module]) -> dict[type[nn.Module], Callable[..., Any]]:
    """The forward of each class that has the one of its own file: some libraries put another there, even before this import."""
    # By the globals of the function: wrappers copy the name of what they wrap, and its module's.
    return {each: each.forward for each in classes if getattr(each.forward, "__globals__", {}).get("__name__") == each.__module__}


FORWARDS = own_forwards(nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, RMSNorm)
ACTIVATIONS: dict[Callable[..., Tensor], str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
ACTIVATIONS |= {function: name for name, function in GATED.items()}
FUNCTIONS = (FunctionType, BuiltinFunctionType)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def feed_forward(layer: Any, x: Tensor, last: nn.Module) -> Tensor:
    """What torch's `_ff_block` computes of the same modules, `last` the dropout at its end."""
    hidden = linear_of(layer.linear1, x, layer.activation)
    out: Tensor = last(linear_of(layer.linear2, layer.dropout(hidden)))
    return out


def linear_of(module: nn.Module, x: Tensor, activation: Callable[..., Tensor] | None = None) -> Tensor:
    """The module's output, through the activation if one is given."""
    if isinstance(module, nn.Linear) and is_plain(module):
        name = ACTIVATIONS.get(activation) if isinstance(activation, FUNCTIONS) else None  # other callables may have no hash
        out = linear(x, module.weight, module.bias, activation=name)
        return out if name is not None or activation is None else activation(out)
    out = module(x)
    return out if activation is None else activation(out)


def add_norm_of(norm: nn.Module, x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + block), and the sum."""
    if is_plain(norm) and not x.is_nested and x.shape == block.shape and x.dtype is block.dtype:
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]:
            return add_norm(x, block, norm.weight, norm.bias, eps=norm.eps)
        if isinstance(norm, RMSNorm) and norm.weight.dtype is x.dtype:
            return add_norm(x, block, norm.weight, eps=norm.eps, kind="rms")
    summed = x + block
    return norm(summed), summed


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs torch's forward of its class and nothing else."""
    stock = FORWARDS.get(type(module))
    if stock is None or type(module).forward is not stock or "forward" in vars(module) or any(getattr(module, name) for name in HOOKS):
        return False
    everywhere = registry._global_forward_hooks, registry._global_forward_pre_hooks
    return not any((*everywhere, registry._global_backward_hooks, registry._global_backward_pre_hooks))
