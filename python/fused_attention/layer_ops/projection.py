"""A linear layer with what follows it: act(x weight' + bias) + residual, the activation plain or gated.

    plain   act(x W' + b)                             relu, gelu, gelu_tanh, silu
    gated   act(x W_gate' + b_gate) · (x W_value' + b_value),  W = [W_gate; W_value]          swiglu: silu, geglu: gelu

Sources: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415; Shazeer, 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, onednn
from .activation import ACTIVATIONS, apply_activation, check_activation
from .choice import heard, kernel_for, needs_gradient, products_pay
from .gate import activate
from .operator import Gradients, differentiate, register, through_plain

FEWEST_ROWS = 8  # below, packing the weight costs more than the product saves
LEAST_FLOPS = 8e6  # below, the way to the kernel costs more


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """act(x weight' + bias) + residual.

    x: (..., in), weight: (out, in), bias: (out,); residual: shaped like the result.
    activation None, "relu", "gelu", "gelu_tanh" or "silu" gives (..., out). "swiglu" and "geglu" give (..., out / 2): the first half of the
    weight's rows makes the gate, the second the value.

    Raises ValueError for another activation, and what F.linear raises for shapes and dtypes that do not fit.
    """
    check_activation(activation)
    kernel = kernel_for(x, weight, bias, residual)
    by_onednn = kernel is None and onednn.takes(x, weight, bias, activation)
    if not (kernel or by_onednn) or not _fits(x, weight, bias, residual, activation):
        return plain_linear(x, weight, bias, residual, activation)
    if by_onednn:
        out = onednn.linear(x, weight, bias, activation)
        return out if residual is None else out + residual
    if kernel == "triton":
        return _on_gpu(x, weight, bias, residual, activation)
    if not _pays(x, weight):
        return plain_linear(x, weight, bias, residual, activation)
    saves = activation is not None and not _slope_shows(activation, residual) and needs_gradient(x, weight, bias)
    run = linear_op if heard(x, weight, bias, residual) else _linear
    fused: Tensor = run(x, weight, bias, residual, activation, saves)[0]
    return fused


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    out = apply_activation(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def _on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """The product is the vendor library's; bias and activation follow in one pass."""
    if activation is None or activation == "relu":
        return plain_linear(x, weight, bias, residual, activation)
    out = activate(F.linear(x, weight), bias, activation)
    return out if residual is None else out + residual


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> bool:
    """Whether the shapes are as the docstring says; what torch would refuse goes to torch."""
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    if activation is not None and weight.shape[0] % ACTIVATIONS[activation].parts:
        return False
    return residual is None or residual.shape == _out_shape(x, weight, activation)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the C++ product is faster than PyTorch's."""
    rows = math.prod(x.shape[:-1])
    return rows >= FEWEST_ROWS and 2 * rows * weight.shape[0] * weight.shape[1] >= LEAST_FLOPS and products_pay()


def _out_shape(x: Tensor, weight: Tensor, activation: str | None) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[0] // (1 if activation is None else ACTIVATIONS[activation].parts))


def _slope_shows(activation: str | None, residual: Tensor | None) -> bool:
    """Whether the result tells the slope of the activation: what it was given need not be kept then."""
    return activation == "relu" and residual is None


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, saves: bool
) -> tuple[Tensor, Tensor]:
    out, pre = cpu.linear(x, weight, bias, residual, activation, saves)
    return out, x.new_empty(0) if pre is None else pre


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, saves: bool
) -> tuple[Tensor, Tensor]:
    pre = (*x.shape[:-1], weight.shape[0]) if saves else (0,)
    return x.new_empty(_out_shape(x, weight, activation)), x.new_empty(pre)


def _linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = cpu.linear_backward(dout, x, weight, pre, activation, needed)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing if dweight is None else dweight, nothing if dbias is None else dbias


def _fake_linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True))
    return dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, activation, saves = inputs
    ctx.set_materialize_grads(False)
    shows = _slope_shows(activation, residual)
    ctx.save_for_backward(x, weight, bias, residual, output[0] if shows else output[1])
    ctx.activation, ctx.saves = activation, saves or shows


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> Gradients:
    if dout is None:
        return (None,) * 6
    x, weight, bias, residual, pre = ctx.saved_tensors
    if torch.is_grad_enabled():
        out = plain_linear(x, weight, bias, residual, ctx.activation)
        return (*through_plain([out], [dout], (x, weight, bias, residual)), None, None)
    needed = list(ctx.needs_input_grad[:3])
    if ctx.activation is not None and not ctx.saves:
        pre = F.linear(x, weight, bias)
    gradients = linear_backward_op(dout, x, weight, pre, ctx.activation, needed) if any(needed) else (None,) * 3
    dx, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return dx, dweight, dbias, dout if ctx.needs_input_grad[3] else None, None, None


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation, bool saves) -> (Tensor out, Tensor pre)",
    _linear,
    _fake_linear,
)
linear_backward_op = register(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, Tensor pre, str? activation, bool[] needed) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _linear_backward,
    _fake_linear_backward,
)
differentiate("linear", _save, _backward)


@register_flop_formula(linear_op.overloadpacket)
def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of the shapes, as PyTorch counts F.linear."""
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(linear_backward_op.overloadpacket)
def _backward_flops(dout: Any, x: tuple[int, ...], weight: tuple[int, ...], pre: Any, activation: Any, needed: list[bool], **_: Any) -> int:
    return (needed[0] + needed[1]) * _flops(x, weight)
