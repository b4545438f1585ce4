"""Rotary position embedding: pairs of a row's elements turned by an angle of the row's position.

    out_a = x_a · cos - x_b · sin,  out_b = x_b · cos + x_a · sin

Source: Su et al., 2021, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu
from .choice import heard, kernel_for, needs_gradient
from .operator import Gradients, differentiate, register


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """Each pair (a, b) of x's elements turned by the angle of cos and sin, or back if inverse.

    x: (batch, heads, seqlen, head_dim), any strides. cos, sin: (seqlen, pairs) or (batch, seqlen, pairs) with 2 · pairs <= head_dim.
    Pair i is (x_i, x_{i + pairs}), or (x_{2i}, x_{2i + 1}) if interleaved; what lies past the pairs is copied. The result has x's dtype
    and the layout of torch.empty_like(x), and is computed in float32, or float64 for float64.

    Raises ValueError for shapes that do not fit.
    """
    _check(x, cos, sin)
    # Triton's kernel takes tables more exact than x.
    kernel = kernel_for(x, cos, sin) or (kernel_for(x) if kernel_for(cos, sin) == "triton" else None)
    if kernel is None or needs_gradient(cos, sin) or (kernel == "triton" and cos.dim() == 3):
        return plain_rotate(x, cos, sin, interleaved, inverse)
    out: Tensor = (rotate_op if heard(x, cos, sin) else _rotate)(x, cos, sin, interleaved, inverse)
    return out


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    pairs = cos.shape[-1]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    cos, sin = (table.to(dtype) if table.dim() == 2 else table.to(dtype)[:, None] for table in (cos, -sin if inverse else sin))
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    # Written in place: torch.cat would lose the layout, in which a layer joins the heads without a copy. Under torch.func the tables
    # may be mapped over where x is not, and a tensor made from x alone could not hold the results.
    mapped = torch._C._are_functorch_transforms_active()
    out = turned_a.new_empty(x.shape, dtype=x.dtype) if mapped else torch.empty_like(x)
    out[..., first] = turned_a
    out[..., second] = turned_b
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    return out


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, heads, seqlen, head_dim)")
    batch, _, seqlen, head_dim = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() not in (2, 3) or table.shape != cos.shape or table.shape[:-1] not in ((seqlen,), (batch, seqlen)):
            expected = f"({seqlen}, pairs) or ({batch}, {seqlen}, pairs), cos and sin alike"
            raise ValueError(f"{name} has shape {tuple(table.shape)}, expected {expected}: one row for each position of x")
        if 2 * table.shape[-1] > head_dim:
            raise ValueError(f"{name} has {table.shape[-1]} pairs, and a head_dim of {head_dim} has at most {head_dim // 2}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    function = gpu.rotate if x.is_cuda else cpu.rotate
    return function(x, cos, sin, interleaved, inverse)


def _fake_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dout: Tensor) -> Gradients:
    cos, sin = ctx.saved_tensors
    return rotate_op(dout, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


rotate_op = register("rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor", _rotate, _fake_rotate)
differentiate("rotate", _save, _backward)
