"""How a layer kernel sees a tensor: rows of one width, read and written in tiles, and summed over the rows in a fixed order.

    sums over rows = sum over parts of (sum over the rows of a part)

A part is a run of rows that depends on the shape alone, so the sums have the same bits on every device and in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch

MOST_PARTS = 512  # a few programs for every multiprocessor, while the partial sums stay small beside the tensors
FEWEST_ROWS = 8  # of a part, or its partial sums would cost as much memory traffic as its rows


class Rows(NamedTuple):
    """Rows with a unit stride along them, as a single kernel argument."""

    ptr: Any
    row: int


def as_rows(x: torch.Tensor | None, count: int, width: int) -> Rows | None:
    """Of a tensor (..., width) of `count` rows; copied only where no single stride leads from row to row, or the last one is not 1."""
    if x is None:
        return None
    flat = x.reshape(count, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return Rows(flat, flat.stride(0))


def as_vector(x: torch.Tensor | None, length: int) -> torch.Tensor | None:
    return None if x is None else x.reshape(length).contiguous()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Parts(NamedTuple):
    """How the rows are divided for sums over them."""

    count: int
    rows: int

    def empty(self, width: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """Room for the partial sums of every part."""
        return Rows(torch.empty(self.count, width, dtype=dtype, device=device), width)


def divide(count: int, tile: int) -> Parts:
    """Of `count` rows that are read in tiles of `tile` rows."""
    held = triton.cdiv(max(FEWEST_ROWS, triton.cdiv(count, MOST_PARTS)), tile) * tile
    return Parts(triton.cdiv(count, held), held)


def sum_parts(partial: Rows | None, like: torch.Tensor | None) -> torch.Tensor | None:
    """The sum over the parts of (parts, width), rounded once, as a tensor like `like`, which has `width` elements."""
    if partial is None or like is None:
        return None
    count, width = partial.ptr.shape
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    block = 64
    launch(sum_parts_kernel, triton.cdiv(width, block), like.device, partial, total, count, width, ROWS=32, BLOCK=block)
    return total


@triton.jit
def sum_parts_kernel(partial, total, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds up BLOCK columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], partial.ptr.dtype.element_ty)
    for start in tl.range(0, count, ROWS):
        sums += load_tile(partial, start + tl.arange(0, ROWS), columns, count, width)
    store_vector(total, columns, width, tl.sum(sums, 0))


@triton.jit
def pointers(x, rows, columns):
    # Rows lie anywhere in a tensor of more than 2**31 elements; a column is never that far from the row's start.
    return x.ptr + rows.to(tl.int64)[:, None] * x.row + columns[None, :]


@triton.jit
def inside(rows, columns, end, width):
    return (rows < end)[:, None] & (columns < width)[None, :]


@triton.jit
def load_tile(x, rows, columns, end, width):
    """In the accumulate dtype; rows at or past `end` and columns at or past `width` read as zero."""
    return widen(tl.load(pointers(x, rows, columns), mask=inside(rows, columns, end, width), other=0.0))


@triton.jit
def store_tile(x, rows, columns, end, width, tile):
    tl.store(pointers(x, rows, columns), tile.to(x.ptr.dtype.element_ty), mask=inside(rows, columns, end, width))


@triton.jit
def load_vector(ptr, index, end):
    return widen(tl.load(ptr + index, mask=index < end, other=0.0))


@triton.jit
def store_vector(ptr, index, end, vector):
    tl.store(ptr + index, vector.to(ptr.dtype.element_ty), mask=index < end)


@triton.jit
def store_part(partial, part, columns, width, sums):
    if partial is not None:
        store_vector(partial.ptr + part * partial.row, columns, width, tl.sum(sums, 0))


@triton.jit
def widen(x):
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x
