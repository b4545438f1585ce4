"""Keys and values that lie in pages, read where they are.

    key j of member b  ->  slot j % PAGE_SIZE of page table[b, j // PAGE_SIZE]

PAGE_SIZE is a compile-time value, so that no key costs a division; None where a member's keys lie in a row. The table is not trusted: its
numbers are clamped to the pages there are. Keys in pages go through the same sums, in the same order, as keys in a row, but where `warps`
gives the tile others, and with sinks where one of the calls has a single split and the other more (decode.py): slots of a cache end where
its capacity does, page_size times the columns of a table may go past SPLIT before.
Source: Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .mask import clamp
from .tensor import load_rows, load_tile, row_pointers
from .tiles import TileConfig

FULL = {64: {4: 2}, 256: {8: 4}, 512: {8: 16}}  # of at most 16 rows of fp32, by the largest head_dim: its tile's warps, and those instead


class Pages(NamedTuple):
    """A page table (batch, pages of a member), and how many pages there are."""

    table: Any
    batch: int  # strides
    column: int
    count: int


def pages(table: torch.Tensor | None, k: torch.Tensor) -> Pages | None:
    return None if table is None else Pages(table, *table.stride(), len(k))


def warps(tile: TileConfig, rows: int, head_dim: int, itemsize: int) -> int:
    """Of a program: where the addresses of keys that lie apart would make a tile for keys in a row spill, others than that has.

    With 4 warps 64 rows of bf16 at head_dim 128 spill 52 times a loop on sm_120, with 8 those of fp32 at 512 do so 3 times.
    """
    if itemsize == 4 and rows <= 16:
        return next(others for widest, others in FULL.items() if widest >= head_dim).get(tile.num_warps, tile.num_warps)
    return 8 if itemsize == 2 and rows > 32 else tile.num_warps


@triton.constexpr_function
def together(page_size, block):
    """Whether a tile of keys lies in one piece: in a row, or on a page that it divides."""
    return page_size is None or page_size % block == 0


@triton.jit
def find(pages, batch, start_n, first, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page and the slot in it of key start_n or, of a tile that is not together, of each key in [start_n + first, start_n + last).

    Of keys in a row the member, which is a page of its own, and start_n.
    """
    page, slot = batch, start_n
    if PAGE_SIZE is not None:
        row = pages.table + tl.cast(batch, tl.int64) * pages.batch
        if together(PAGE_SIZE, BLOCK_N):
            number = tl.load(row + tl.cast(start_n // PAGE_SIZE, tl.int64) * pages.column)
        else:
            slot = start_n + tl.arange(0, BLOCK_N)
            number = tl.load(row + (slot // PAGE_SIZE).to(tl.int64) * pages.column, mask=real(first, last, BLOCK_N), other=0)
        page, slot = clamp(number, 0, pages.count - 1), slot % PAGE_SIZE
    return page, slot


@triton.jit
def load(x, page, slot, head, first, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr):
    """The rows that were found, in chunks; the first `first` and those from `last` on read as zero."""
    if together(PAGE_SIZE, BLOCK_N):
        tiles = load_tile(x, page, head, slot, first, last, BLOCK_N, DIM)
    else:
        tiles = load_rows(x, row_pointers(x, page[:, None], head, slot[:, None]), real(first, last, BLOCK_N)[:, None], DIM)
    return tiles


@triton.jit
def real(first, last, BLOCK_N: tl.constexpr):
    rows = tl.arange(0, BLOCK_N)
    return (rows >= first) & (rows < last)
