"""The C++ kernels of csrc/cpu on float32 tensors: flattened to rows where a view can be, and handed over as addresses and strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_attention.cpu_backend import threads

from .activation import ACTIVATIONS

PART_ROWS = 64  # kPartRows of csrc/cpu/norm.inl

Matrix = tuple[int, int, int]  # address, and the strides of rows and columns
NOTHING: Matrix = (0, 0, 0)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, saves: bool
) -> tuple[Tensor, Tensor | None]:
    """out, and if `saves` what its activation was given; x: (..., in)."""
    from fused_attention import _cpu

    columns, steps = weight.shape
    act = None if activation is None else ACTIVATIONS[activation]
    width = columns if act is None else columns // act.parts
    gated = act is not None and act.parts == 2
    out = x.new_empty((*x.shape[:-1], width))
    sums = x.new_empty((*x.shape[:-1], columns)) if saves or gated else None
    rows = _rows(x)
    residual = None if residual is None else _unit_rows(residual)
    bias = None if bias is None else bias.contiguous()
    _cpu.product(
        *(_matrix(rows), _matrix(weight.T), _matrix(_rows(out)), _matrix(residual), _matrix(None if sums is None else _rows(sums))),
        *(_address(bias), (len(rows), columns, steps), 0 if act is None else act.number, gated, threads()),
    )
    return out, sums if saves else None


def linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str | None, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias; `pre` is what the activation was given, or what relu made of it."""
    slope = _rows(dout) if activation is None else _activation_backward(dout, pre, activation)
    dx, dweight = (x.new_empty(like.shape) if need else None for like, need in zip((x, weight), needed[:2], strict=True))
    if dx is not None:
        _product(slope, weight, _rows(dx))
    if dweight is not None:
        _product(slope.T, _rows(x), dweight)
    return dx, dweight, _sum_rows(slope) if needed[2] else None


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, summed (empty without a residual), mean (empty unless centred) and rstd."""
    from fused_attention import _cpu

    nothing = x.new_empty(0)
    out, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1])
    summed = nothing if residual is None else x.new_empty(x.shape)
    mean = torch.empty_like(rstd) if centred else nothing
    given = _unit_rows(x)
    rows = given if residual is None else _rows(summed)
    residual = None if residual is None else _unit_rows(residual)
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    vectors = (_address(weight), _address(bias), mean.data_ptr() if centred else 0, rstd.data_ptr())
    sizes = (rstd.numel(), x.shape[-1])
    _cpu.add_norm(_matrix(given), _matrix(residual), _matrix(rows), _matrix(_rows(out)), vectors, sizes, eps, threads())
    return out, summed, mean, rstd


def add_norm_backward(
    dout: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two empty where there is no such vector."""
    from fused_attention import _cpu

    count, width = rstd.numel(), summed.shape[-1]
    dx = summed.new_empty(summed.shape)
    parts = -(-count // PART_ROWS)
    dweights, dbiases = (None if vector is None else summed.new_empty((parts, width)) for vector in (weight, bias))
    arrived = None if dsummed is None else _unit_rows(dsummed)
    weight = None if weight is None else weight.contiguous()
    dout, rows = _unit_rows(dout), _unit_rows(summed)
    _cpu.add_norm_backward(
        *(_matrix(dout), _matrix(arrived), _matrix(rows), _matrix(_rows(dx)), _matrix(dweights), _matrix(dbiases)),
        *((_address(weight), _address(mean), rstd.data_ptr()), (count, width), threads()),
    )
    dweight, dbias = (summed.new_empty(0) if sums is None else _sum_rows(sums) for sums in (dweights, dbiases))
    return dx, dweight, dbias


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x + bias); x: (..., columns), gated [gate | value]."""
    from fused_attention import _cpu

    act = ACTIVATIONS[activation]
    rows = _unit_rows(x if bias is None else x + bias)
    width = rows.shape[1] // act.parts
    out = x.new_empty((*x.shape[:-1], width))
    gate, value = _matrix(rows[:, :width]), _matrix(rows[:, width:]) if act.parts == 2 else NOTHING
    _cpu.activate(gate, value, _matrix(_rows(out)), (len(rows), width), act.number, threads())
    return out


def bias_activation_backward(dout: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """dx, and dbias, empty where there is no bias."""
    dx = _activation_backward(dout, x if bias is None else x + bias, activation)
    return dx.view(x.shape), x.new_empty(0) if bias is None else _sum_rows(dx)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    from fused_attention import _cpu

    batch, heads, seqlen, head_dim = x.shape
    pairs = cos.shape[-1]
    out = torch.empty_like(x)
    cos, sin = (table.expand(batch, seqlen, pairs)[:, None].expand(batch, heads, seqlen, pairs) for table in (cos, sin))
    view_x, view_out, view_cos, view_sin = ((tensor.data_ptr(), *tensor.stride()) for tensor in (x, out, cos, sin))
    _cpu.rotate(view_x, view_out, view_cos, view_sin, (batch, heads, seqlen, head_dim, pairs), interleaved, inverse, threads())
    return out


def _activation_backward(dout: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of what the activation was given, (rows, columns) like it."""
    from fused_attention import _cpu

    act = ACTIVATIONS[activation]
    dout, x = _unit_rows(dout), _unit_rows(x)
    dx = x.new_empty(x.shape)
    width = x.shape[1] // act.parts
    (gate, dgate), (value, dvalue) = ((x[:, :width], dx[:, :width]), (x[:, width:], dx[:, width:]))
    matrices = _matrix(dout), _matrix(gate), _matrix(value if act.parts == 2 else None), _matrix(dgate), _matrix(dvalue)
    _cpu.activate_backward(*matrices, (len(x), width), act.number, threads())
    return dx


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    from fused_attention import _cpu

    sizes = (*out.shape, a.shape[1])
    _cpu.product(_matrix(a), _matrix(b), _matrix(out), NOTHING, NOTHING, 0, sizes, 0, False, threads())


def _sum_rows(x: Tensor) -> Tensor:
    from fused_attention import _cpu

    rows, width = x.shape
    out = x.new_empty(width)
    x = _unit_rows(x)  # a name, or a copy would be gone before its sum
    _cpu.sum_rows(_matrix(x), out.data_ptr(), (rows, width), threads())
    return out


def _rows(x: Tensor) -> Tensor:
    """(..., width) as (rows, width): a view, or a copy where no single stride leads from row to row."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _unit_rows(x: Tensor) -> Tensor:
    """The same with neighbours along a row side by side in memory."""
    rows = _rows(x)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _matrix(x: Tensor | None) -> Matrix:
    return NOTHING if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
