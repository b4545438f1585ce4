"""Which tiles a mask tensor leaves something to see in, listed before a pass, so that its loop visits these alone.

    starts = the tiles of keys of which a tile of queries sees any (or the reverse), in order
    ranks[t] = how many of them come before tile t

A list instead of a branch in the loop: loads inside a branch are not pipelined. Its size is that of the mask, a tile an element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch
from .mask import pair_pointers
from .tensor import broadcast_view

SPAN = 256  # elements of the listed dimension that are looked at together
ROWS = 32  # bytes of a sector, where the mask is read along its other side


class Visits(NamedTuple):
    """One list for each tile of a mask's own heads and members; a stride is 0 where they share it."""

    starts: Any  # (lists, tiles), or None where the mask is alike for all of them: a tile sees every one or none
    ranks: Any  # (lists, tiles + 1)
    tiles: int
    batch: int  # lists from one to the next
    head: int
    own: int


def of_keys(mask: torch.Tensor | None, block_m: int, block_n: int, shared: int = 1) -> Visits | None:
    """The key tiles of each tile of queries; `shared` successive heads have one list."""
    return None if mask is None else _visits(mask, block_m, block_n, shared)


def of_queries(mask: torch.Tensor | None, block_m: int, block_n: int) -> Visits | None:
    """The query tiles of each tile of keys."""
    return None if mask is None else _visits(mask.transpose(-2, -1), block_n, block_m, 1)


def _visits(mask: torch.Tensor, own_block: int, block: int, shared: int) -> Visits:
    """Of a mask whose last two dimensions are the list's own and the listed one."""
    batches, heads, length, listed = mask.shape if mask.dim() == 4 else (1, 1, *mask.shape)
    shared = shared if heads > 1 else 1
    own_tiles, tiles, head_lists = -(-length // own_block), -(-listed // block), heads // shared
    lists = batches * head_lists * own_tiles
    starts = mask.new_empty(lists, tiles, dtype=torch.int32)
    ranks = mask.new_empty(lists, tiles + 1, dtype=torch.int32)
    launch(
        visits_kernel, lists, mask.device, broadcast_view(mask), starts, ranks, length, listed, tiles, own_tiles, head_lists,
        SHARED=shared, OWN_BLOCK=own_block, BLOCK=block, CHUNK=max(1, SPAN // block), ROWS=min(ROWS, own_block), num_warps=8,
    )  # fmt: skip
    return Visits(
        starts=None if listed == 1 else starts,
        ranks=ranks,
        tiles=tiles,
        batch=own_tiles * head_lists if batches > 1 else 0,
        head=own_tiles if head_lists > 1 else 0,
        own=1 if own_tiles > 1 else 0,
    )


@triton.jit
def visits_kernel(
    mask, starts, ranks, length, listed, tiles, own_tiles, head_lists,
    SHARED: tl.constexpr, OWN_BLOCK: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program writes one list."""
    program = tl.program_id(0).to(tl.int64)
    own = (program % own_tiles * OWN_BLOCK).to(tl.int32)
    head = (program // own_tiles % head_lists).to(tl.int32) * SHARED
    batch = (program // own_tiles // head_lists).to(tl.int32)
    starts += program * tiles
    ranks += program * (tiles + 1)
    count = 0
    for first in range(0, tiles, CHUNK):
        cols = first * BLOCK + tl.arange(0, CHUNK * BLOCK)
        shown = tl.zeros([CHUNK * BLOCK], tl.int32)
        for row in range(0, SHARED * OWN_BLOCK, ROWS):
            rows = own + row % OWN_BLOCK + tl.arange(0, ROWS)[:, None]
            inside = (rows < length) & (cols < listed)[None, :]
            bits = tl.load(pair_pointers(mask, batch, head + row // OWN_BLOCK, rows, cols[None, :]), mask=inside, other=0)
            shown = tl.maximum(shown, tl.max((bits != 0).to(tl.int32), 0))
        any_shown = tl.max(tl.reshape(shown, [CHUNK, BLOCK]), 1)
        before = count + tl.cumsum(any_shown, 0) - any_shown
        numbers = first + tl.arange(0, CHUNK)
        tl.store(starts + before, numbers, mask=any_shown != 0)
        tl.store(ranks + numbers, before, mask=numbers < tiles)
        count += tl.sum(any_shown, 0)
    tl.store(ranks + tiles, count)


@triton.jit
def find(visits, batch, head, start, OWN_BLOCK: tl.constexpr):
    """The number of the list of the tile that starts there."""
    place = tl.cast(0, tl.int64)
    if visits is not None:
        place = tl.cast(batch, tl.int64) * visits.batch + tl.cast(head, tl.int64) * visits.head + start // OWN_BLOCK * visits.own
    return place


@triton.jit
def turns(visits, place, low, high, BLOCK: tl.constexpr):
    """A loop's range, in steps of BLOCK, whose turns visit the tiles in [low, high); low, where one begins, may lie past them all."""
    if visits is not None:
        ranks = visits.ranks + place * (visits.tiles + 1)
        if visits.starts is None:
            high = tl.where(tl.load(ranks + 1) > 0, high, low)
        else:
            high = tl.load(ranks + tl.minimum((tl.maximum(high, low) + BLOCK - 1) // BLOCK, visits.tiles)) * BLOCK
            low = tl.load(ranks + tl.minimum(low // BLOCK, visits.tiles)) * BLOCK
    return low, high


@triton.jit
def start(visits, place, turn, BLOCK: tl.constexpr):
    """Where the tile of a turn begins."""
    at = turn
    if visits is not None:  # noqa: SIM102  # None has no starts to ask for, and Triton looks at both sides of an `and`
        if visits.starts is not None:
            at = tl.load(visits.starts + place * visits.tiles + turn // BLOCK) * BLOCK
    return at
