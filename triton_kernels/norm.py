"""Add and normalise, forward and backward: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) of x + residual.

    summed  = x + residual,  mean = Σ summed / width,  rstd = 1 / sqrt(Σ (summed - mean)² / width + eps)
    normal  = (summed - mean) · rstd,  out = normal · weight + bias
    slope   = dout · weight
    dx      = dresidual = rstd · (slope - normal · Σ slope · normal / width - Σ slope / width) + dsummed
    dweight = Σ_rows dout · normal,  dbias = Σ_rows dout

RMSNorm is the same with a mean of 0 and without the last mean of dx.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch
from .rows import (
    accumulate_dtype,
    as_rows,
    as_vector,
    divide,
    inside,
    load_tile,
    load_vector,
    store_part,
    store_tile,
    store_vector,
    sum_parts,
)

WIDEST_BLOCK = 4096  # columns of a row held in registers; what a wider row has beyond them is read again by every pass


class Normalised(NamedTuple):
    out: torch.Tensor
    summed: torch.Tensor
    mean: torch.Tensor | None
    rstd: torch.Tensor


class NormGradients(NamedTuple):
    dx: torch.Tensor
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


class Tile(NamedTuple):
    rows: int
    block: int
    num_warps: int


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    kind: Literal["layer", "rms"],
) -> Normalised:
    """Normalise each row of x + residual, after that sum is rounded to x's dtype: backward then sees what forward saw.

    x, residual: (..., width); weight, bias: (width,). mean, rstd: (...), in the accumulate dtype, mean None for "rms".
    Without a residual `summed` is x itself.
    """
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    rstd = torch.empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    count, tile = rstd.numel(), tile_for(width)
    launch(
        add_norm_kernel, triton.cdiv(count, tile.rows), x.device,
        as_rows(x, count, width), as_rows(residual, count, width), as_vector(weight, width), as_vector(bias, width),
        as_rows(out, count, width), None if residual is None else as_rows(summed, count, width), mean, rstd,
        count, width, EPS=eps, WIDE=width > tile.block, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    return Normalised(out, summed, mean, rstd)


def add_norm_backward(
    dout: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
) -> NormGradients:
    """The gradients of x (the residual's is the same), of weight and of bias; dsummed is what arrives at `summed`."""
    width, count = summed.shape[-1], rstd.numel()
    dx = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    tile = tile_for(width)
    parts = divide(count, tile.rows)
    dweights, dbiases = (None if vector is None else parts.empty(width, rstd.dtype, rstd.device) for vector in (weight, bias))
    read = as_rows(dout, count, width), as_rows(summed, count, width)
    saved = as_vector(mean, count), as_vector(rstd, count)
    launch(
        add_norm_backward_kernel, parts.count, dx.device,
        *read, as_rows(dsummed, count, width), as_vector(weight, width), *saved, as_rows(dx, count, width), dweights, dbiases,
        count, width, parts.rows, WIDE=width > tile.block, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    if dweights is not None or dbiases is not None:
        blocks = triton.cdiv(max(width - tile.block, 0), 128)
        launch(
            norm_columns_kernel, parts.count * blocks, dx.device,
            *read, *saved, dweights, dbiases, tile.block, count, width, parts.rows, ROWS=8, BLOCK=128,
        )  # fmt: skip
    return NormGradients(dx, sum_parts(dweights, weight), sum_parts(dbiases, bias))


def tile_for(width: int) -> Tile:
    """Whole rows where they fit; 8 elements of each tensor for a thread, for backward holds six such tiles at a time."""
    block = min(triton.next_power_of_2(max(width, 1)), WIDEST_BLOCK)
    rows = max(1, 1024 // block)
    return Tile(rows, block, rows * block // 256)


@triton.jit
def add_norm_kernel(
    x, residual, weight, bias, out, summed, mean, rstd,
    count, width,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program normalises ROWS rows, of which it keeps the first BLOCK columns in registers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    rest = width if WIDE else BLOCK  # a constant where a row fits: no loop is compiled then
    length = tl.maximum(width, 1)  # a mean over no columns is 0, not 0 / 0
    first = add(x, residual, out, rows, columns, count, width)

    centre = tl.zeros([ROWS], rstd.dtype.element_ty)
    if mean is not None:
        total = tl.sum(first, 1)
        for start in tl.range(BLOCK, rest, BLOCK):
            total += tl.sum(add(x, residual, out, rows, start + columns, count, width), 1)
        centre = total / length
        store_vector(mean, rows, count, centre)

    squares = sum_of_squares(first, centre, rows, columns, count, width)
    for start in tl.range(BLOCK, rest, BLOCK):
        tile = add(x, residual, out, rows, start + columns, count, width)
        squares += sum_of_squares(tile, centre, rows, start + columns, count, width)
    scale = tl.rsqrt(squares / length + EPS)
    store_vector(rstd, rows, count, scale)

    store_normal(first, centre, scale, weight, bias, out, summed, rows, columns, count, width)
    for start in tl.range(BLOCK, rest, BLOCK):
        tile = add(x, residual, out, rows, start + columns, count, width)
        store_normal(tile, centre, scale, weight, bias, out, summed, rows, start + columns, count, width)


@triton.jit
def add(x, residual, out, rows, columns, end, width):
    tile = load_tile(x, rows, columns, end, width)
    if residual is not None:
        tile = (tile + load_tile(residual, rows, columns, end, width)).to(out.ptr.dtype.element_ty).to(tile.dtype)
    return tile


@triton.jit
def sum_of_squares(tile, centre, rows, columns, end, width):
    # Columns past the width hold 0, and 0 - mean is not 0.
    deviation = tl.where(inside(rows, columns, end, width), tile - centre[:, None], 0.0)
    return tl.sum(deviation * deviation, 1)


@triton.jit
def store_normal(tile, centre, scale, weight, bias, out, summed, rows, columns, end, width):
    if summed is not None:
        store_tile(summed, rows, columns, end, width, tile)
    normal = (tile - centre[:, None]) * scale[:, None]
    if weight is not None:
        normal *= load_vector(weight, columns, width)[None, :]
    if bias is not None:
        normal += load_vector(bias, columns, width)[None, :]
    store_tile(out, rows, columns, end, width, normal)


@triton.jit
def add_norm_backward_kernel(
    dout, summed, dsummed, weight, mean, rstd, dx, dweights, dbiases,
    count, width, part_rows,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program differentiates a part of the rows, and adds up the first BLOCK columns of dweight and dbias on the way."""
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * part_rows, count)
    columns = tl.arange(0, BLOCK)
    rest = width if WIDE else BLOCK  # a constant where a row fits: no loop is compiled then
    dweight = tl.zeros([ROWS, BLOCK], rstd.dtype.element_ty)
    dbias = tl.zeros([ROWS, BLOCK], rstd.dtype.element_ty)
    length = tl.maximum(width, 1)

    for top in tl.range(part * part_rows, end, ROWS):
        rows = top + tl.arange(0, ROWS)
        scale = load_vector(rstd, rows, end)
        gradient, normal = load_pair(dout, summed, mean, scale, rows, columns, end, width)
        dweight += gradient * normal
        dbias += gradient
        slope = weighted(gradient, weight, columns, width)

        along, level = tl.sum(slope * normal, 1), tl.sum(slope, 1)
        for start in tl.range(BLOCK, rest, BLOCK):
            gradient, more = load_pair(dout, summed, mean, scale, rows, start + columns, end, width)
            gradient = weighted(gradient, weight, start + columns, width)
            along += tl.sum(gradient * more, 1)
            level += tl.sum(gradient, 1)
        along /= length
        level = level / length if mean is not None else tl.zeros_like(level)

        store_dx(slope, normal, along, level, scale, dsummed, dx, rows, columns, end, width)
        for start in tl.range(BLOCK, rest, BLOCK):
            gradient, more = load_pair(dout, summed, mean, scale, rows, start + columns, end, width)
            gradient = weighted(gradient, weight, start + columns, width)
            store_dx(gradient, more, along, level, scale, dsummed, dx, rows, start + columns, end, width)

    store_part(dweights, part, columns, width, dweight)
    store_part(dbiases, part, columns, width, dbias)


@triton.jit
def norm_columns_kernel(
    dout, summed, mean, rstd, dweights, dbiases,
    first, count, width, part_rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK columns, from `first` on, over a part of the rows: those that backward could not keep."""
    blocks = tl.cdiv(width - first, BLOCK)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = first + tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum((part + 1) * part_rows, count)
    dweight = tl.zeros([ROWS, BLOCK], rstd.dtype.element_ty)
    dbias = tl.zeros([ROWS, BLOCK], rstd.dtype.element_ty)
    for top in tl.range(part * part_rows, end, ROWS):
        rows = top + tl.arange(0, ROWS)
        gradient, normal = load_pair(dout, summed, mean, load_vector(rstd, rows, end), rows, columns, end, width)
        dweight += gradient * normal
        dbias += gradient
    store_part(dweights, part, columns, width, dweight)
    store_part(dbiases, part, columns, width, dbias)


@triton.jit
def load_pair(dout, summed, mean, scale, rows, columns, end, width):
    """The gradient that arrives at the output and the normalised row, both 0 outside."""
    tile = load_tile(summed, rows, columns, end, width)
    if mean is not None:
        tile = tl.where(inside(rows, columns, end, width), tile - load_vector(mean, rows, end)[:, None], 0.0)
    return load_tile(dout, rows, columns, end, width), tile * scale[:, None]


@triton.jit
def weighted(gradient, weight, columns, width):
    if weight is not None:
        gradient *= load_vector(weight, columns, width)[None, :]
    return gradient


@triton.jit
def store_dx(slope, normal, along, level, scale, dsummed, dx, rows, columns, end, width):
    tile = scale[:, None] * (slope - normal * along[:, None] - level[:, None])
    if dsummed is not None:
        tile += load_tile(dsummed, rows, columns, end, width)
    store_tile(dx, rows, columns, end, width, tile)
