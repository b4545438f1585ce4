"""Bias and activation, forward and backward: GELU (Hendrycks and Gimpel 2016), SwiGLU and GEGLU (Shazeer 2020).

out = act(x + bias)                                   plain
out = act(gate + bias_gate) · (value + bias_value)    gated: x = [gate | value], bias = [bias_gate | bias_value]
dgate = dout · value · act'(gate),  dvalue = dout · act(gate),  dbias = Σ_rows dx

gelu       x · Φ(x),  Φ(x) = (1 + erf(x / √2)) / 2
gelu_tanh  x · (1 + tanh y) / 2 = x · sigmoid(2y),  y = √(2/π) (x + 0.044715 x³)
silu       x · sigmoid(x)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch
from .rows import Rows, accumulate_dtype, as_rows, divide, load_tile, load_vector, store_part, store_tile, sum_parts

Activation = Literal["gelu", "gelu_tanh", "silu"]
TILE = {"ROWS": 4, "BLOCK": 256}

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
GAUSSIAN_PEAK = tl.constexpr(1 / math.sqrt(2 * math.pi))
TANH_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_CUBIC = tl.constexpr(0.044715)


class ActivationGradients(NamedTuple):
    dx: torch.Tensor
    dbias: torch.Tensor | None


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, *, activation: Activation, gated: bool) -> torch.Tensor:
    """x: (..., width) or, gated, (..., 2 · width) with the half that is activated first; bias: (x.shape[-1],). Gives (..., width)."""
    count, wide, width = shape(x, gated)
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    launch(
        bias_activation_kernel, triton.cdiv(count, TILE["ROWS"]) * triton.cdiv(width, TILE["BLOCK"]), x.device,
        *halves(as_rows(x, count, wide), gated), *halves(as_rows(bias, 1, wide), gated), as_rows(out, count, width),
        count, width, ACTIVATION=activation, **TILE,
    )  # fmt: skip
    return out


def bias_activation_backward(
    dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, *, activation: Activation, gated: bool
) -> ActivationGradients:
    """dout: (..., width); x and bias as in forward, whose shapes dx and dbias have."""
    count, wide, width = shape(x, gated)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = divide(count, TILE["ROWS"])
    dbiases = None if bias is None else parts.empty(wide, accumulate_dtype(x.dtype), x.device)
    launch(
        bias_activation_backward_kernel, parts.count * triton.cdiv(width, TILE["BLOCK"]), x.device,
        as_rows(dout, count, width), *halves(as_rows(x, count, wide), gated), *halves(as_rows(bias, 1, wide), gated),
        *halves(as_rows(dx, count, wide), gated), *halves(dbiases, gated),
        count, width, parts.rows, ACTIVATION=activation, **TILE,
    )  # fmt: skip
    return ActivationGradients(dx, sum_parts(dbiases, bias))


def shape(x: torch.Tensor, gated: bool) -> tuple[int, int, int]:
    """How many rows x has, how wide they are, and how wide those of the output."""
    wide = x.shape[-1]
    if gated and wide % 2:
        raise ValueError(f"x has rows of {wide} elements: a gated activation halves them, so their number must be even")
    return math.prod(x.shape[:-1]), wide, wide // 2 if gated else wide


def halves(x: Rows | None, gated: bool) -> tuple[Rows | None, Rows | None]:
    if x is None or not gated:
        return x, None
    left, right = x.ptr.chunk(2, dim=1)
    return Rows(left, x.row), Rows(right, x.row)


@triton.jit
def bias_activation_kernel(
    gate, value, bias_gate, bias_value, out,
    count, width,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes ROWS rows of BLOCK columns."""
    blocks = tl.cdiv(width, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tile, _ = activate(load_biased(gate, bias_gate, rows, columns, count, width), ACTIVATION)
    if value is not None:
        tile *= load_biased(value, bias_value, rows, columns, count, width)
    store_tile(out, rows, columns, count, width, tile)


@triton.jit
def bias_activation_backward_kernel(
    dout, gate, value, bias_gate, bias_value, dgate, dvalue, dbias_gates, dbias_values,
    count, width, part_rows,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program differentiates BLOCK columns of a part of the rows, and adds up their bias gradients on the way."""
    blocks = tl.cdiv(width, BLOCK)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum((part + 1) * part_rows, count)
    ACCUMULATE: tl.constexpr = tl.float64 if gate.ptr.dtype.element_ty == tl.float64 else tl.float32
    gate_sums = tl.zeros([ROWS, BLOCK], ACCUMULATE)
    value_sums = tl.zeros([ROWS, BLOCK], ACCUMULATE)
    for top in tl.range(part * part_rows, end, ROWS):
        rows = top + tl.arange(0, ROWS)
        gradient = load_tile(dout, rows, columns, end, width)
        activated, slope = activate(load_biased(gate, bias_gate, rows, columns, end, width), ACTIVATION)
        if value is not None:
            dvalue_tile = gradient * activated
            store_tile(dvalue, rows, columns, end, width, dvalue_tile)
            value_sums += dvalue_tile
            gradient *= load_biased(value, bias_value, rows, columns, end, width)
        gradient *= slope
        store_tile(dgate, rows, columns, end, width, gradient)
        gate_sums += gradient
    store_part(dbias_gates, part, columns, width, gate_sums)
    store_part(dbias_values, part, columns, width, value_sums)


@triton.jit
def load_biased(x, bias, rows, columns, end, width):
    tile = load_tile(x, rows, columns, end, width)
    if bias is not None:
        tile += load_vector(bias.ptr, columns, width)[None, :]
    return tile


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x)."""
    if ACTIVATION == "gelu":
        # tl.erf is the one erf that both the interpreter and every target's compiler have.
        below = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
        return x * below, below + x * (GAUSSIAN_PEAK * tl.exp(-0.5 * x * x))
    if ACTIVATION == "gelu_tanh":
        # Past 32 the activation is 0 or x to the last bit, and x * x must not overflow: its infinity times 0 would be nan.
        square = tl.minimum(x * x, 1024.0)
        argument = TANH_SLOPE * x * (1.0 + TANH_CUBIC * square)
        on, off = tl.sigmoid(argument), tl.sigmoid(-argument)
        return x * on, on + x * on * off * (TANH_SLOPE * (1.0 + 3.0 * TANH_CUBIC * square))
    on, off = tl.sigmoid(x), tl.sigmoid(-x)
    return x * on, on * (1.0 + x * off)
