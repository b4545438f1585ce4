"""Activations of a whole tensor, gated as in SwiGLU and GEGLU or plain: act(gate) · value of rows [gate | value], or act(x).

Source: Shazeer, 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu
from .activation import ACTIVATIONS, GATED, apply_activation
from .choice import heard, kernel_for
from .operator import Gradients, differentiate, register, through_plain

LEAST_ELEMENTS = 2**17  # below, the way to the C++ kernel costs more than it saves


def gated(x: Tensor, *, activation: str = "swiglu") -> Tensor:
    """act(gate) · value, with silu for "swiglu" and gelu for "geglu".

    x: (..., 2 · width), the gate first; the result is (..., width). Raises ValueError for another activation, or an odd last dimension.
    """
    if activation not in GATED:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(map(repr, GATED))}")
    kernel = kernel_for(x)
    if kernel is None or x.dim() == 0 or x.shape[-1] % 2 or (kernel == "cpu" and x.numel() < LEAST_ELEMENTS):
        return apply_activation(x, activation)
    return activate(x, None, activation)


def activate(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x + bias) by a kernel, for tensors that one takes."""
    out: Tensor = (activate_op if heard(x, bias) else _activate)(x, bias, activation)
    return out


def _plain(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return apply_activation(x if bias is None else x + bias, activation)


def _activate(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    function = gpu.bias_activation if x.is_cuda else cpu.bias_activation
    return function(x, bias, activation)


def _fake_activate(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // ACTIVATIONS[activation].parts))


def _activate_backward(dout: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    function = gpu.bias_activation_backward if x.is_cuda else cpu.bias_activation_backward
    return function(dout, x, bias, activation)


def _fake_activate_backward(dout: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dout: Tensor) -> Gradients:
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*through_plain([_plain(x, bias, ctx.activation)], [dout], [x, bias]), None)
    dx, dbias = activate_backward_op(dout, x, bias, ctx.activation)
    return dx, dbias if ctx.needs_input_grad[1] else None, None


activate_op = register("activate(Tensor x, Tensor? bias, str activation) -> Tensor", _activate, _fake_activate)
activate_backward_op = register(
    "activate_backward(Tensor dout, Tensor x, Tensor? bias, str activation) -> (Tensor dx, Tensor dbias)",
    _activate_backward,
    _fake_activate_backward,
)
differentiate("activate", _save, _backward)
