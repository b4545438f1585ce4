"""How a kernel sees a tensor: a pointer with one stride an axis, read and written in tiles of rows.

A row of head_dim elements is held as one or two chunks whose widths are powers of two: 96 = 64 + 32, 128 = 128, 80 = 64 + 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class View(NamedTuple):
    """A (batch, head, seq, dim) tensor as a single kernel argument; a stride of 0 repeats.

    Triton specialises each field on its own: a unit stride becomes a compile-time 1, so contiguous rows are read as vectors.
    """

    ptr: Any
    batch: int
    head: int
    seq: int
    dim: int


def view(x: torch.Tensor | None) -> View | None:
    """Of a tensor (batch, heads, seqlen, dim), or packed (total, heads, dim)."""
    if x is None:
        return None
    strides = x.stride()
    return View(x, *strides) if len(strides) == 4 else View(x, 0, strides[1], strides[0], strides[2])


def rows_view(x: torch.Tensor | None) -> View | None:
    """Of one number a row: (batch, heads, seqlen), or packed (heads, total)."""
    if x is None:
        return None
    strides = x.stride()
    return View(x, *strides, 0) if len(strides) == 3 else View(x, 0, *strides, 0)


def broadcast_view(x: torch.Tensor | None) -> View | None:
    """Of (seqlen_q, seqlen_k), or of four dimensions of which those of size 1 repeat."""
    if x is None:
        return None
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return View(x, *strides) if len(strides) == 4 else View(x, 0, 0, *strides)


@triton.constexpr_function
def widths(dim):
    """The chunks of a row: two where that holds fewer elements than the next power of two."""
    whole = max(16, 1 << (dim - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << max(dim - first - 1, 0).bit_length())
    return (first, second) if first >= 16 and first + second < whole else (whole,)


@triton.constexpr_function
def chunks(dim):
    return len(widths(dim))


@triton.constexpr_function
def width(dim, chunk):
    return widths(dim)[chunk]


@triton.constexpr_function
def first_column(dim, chunk):
    return sum(widths(dim)[:chunk])


@triton.constexpr_function
def fills(dim, chunk):
    """Whether every column of a chunk exists."""
    return sum(widths(dim)[: chunk + 1]) <= dim


@triton.jit
def row_pointers(x, batch, head, start):
    """Where row `start` of a head begins: only this can lie beyond 2**31 elements."""
    return x.ptr + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head + tl.cast(start, tl.int64) * x.seq


@triton.jit
def chunk_columns(dim: tl.constexpr, chunk: tl.constexpr):
    return first_column(dim, chunk) + tl.arange(0, width(dim, chunk))


@triton.jit
def load_tile(x, batch, head, start, first, last, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Rows [start, start + ROWS) of a head in chunks; rows outside [start + first, start + last) read as zero."""
    rows = tl.arange(0, ROWS)
    inside = ((rows >= first) & (rows < last))[:, None]
    return load_rows(x, row_pointers(x, batch, head, start) + rows[:, None].to(tl.int64) * x.seq, inside, DIM)


@triton.jit
def load_rows(x, pointers, inside, DIM: tl.constexpr):
    """The rows at (ROWS, 1) pointers, in chunks."""
    tiles = ()
    for chunk in tl.static_range(chunks(DIM)):
        columns = chunk_columns(DIM, chunk)[None, :]
        here = inside if fills(DIM, chunk) else inside & (columns < DIM)
        tiles = tiles + (tl.load(pointers + columns.to(tl.int64) * x.dim, mask=here, other=0.0),)
    return tiles


@triton.jit
def store_tile(x, batch, head, start, last, tiles, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write the first `last` of ROWS rows, in the tensor's dtype."""
    rows = tl.arange(0, ROWS)
    store_rows(x, row_pointers(x, batch, head, start) + rows[:, None].to(tl.int64) * x.seq, (rows < last)[:, None], tiles, DIM)


@triton.jit
def store_rows(x, pointers, inside, tiles, DIM: tl.constexpr):
    for chunk in tl.static_range(chunks(DIM)):
        columns = chunk_columns(DIM, chunk)[None, :]
        here = inside if fills(DIM, chunk) else inside & (columns < DIM)
        tl.store(pointers + columns.to(tl.int64) * x.dim, tiles[chunk].to(x.ptr.dtype.element_ty), mask=here)


@triton.jit
def load_numbers(x, batch, head, start, last, other, ROWS: tl.constexpr):
    """One number for each of ROWS rows; `other` where there is no row."""
    rows = tl.arange(0, ROWS)
    return tl.load(row_pointers(x, batch, head, start) + rows.to(tl.int64) * x.seq, mask=rows < last, other=other)


@triton.jit
def store_numbers(x, batch, head, start, last, numbers, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    tl.store(row_pointers(x, batch, head, start) + rows.to(tl.int64) * x.seq, numbers.to(x.ptr.dtype.element_ty), mask=rows < last)
