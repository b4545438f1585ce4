"""Which keys a query may see, which tiles of keys a tile of queries visits (and the reverse), and which of those need a mask.

    begin <= j < end   and   lower <= j - i <= upper,        lower = offset - window_left,  upper = offset + window_right

i and j count inside their member of the batch, packed or not. What tensors hold is clamped: no value leads outside the member.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .options import Options
from .tensor import row_pointers

FARTHEST_PAIR = tl.constexpr(2**31 - 1)  # beyond every difference of two positions
FAR = tl.constexpr(2**61)  # sums of two offsets stay inside int64


class Sight(NamedTuple):
    """What bounds the sight of all queries; None: nothing does."""

    seqlen_q: int  # of each member, or the total of packed members
    seqlen_k: int
    batch: int
    left: int | None
    right: int | None
    offset: int | None
    offsets: Any  # pointers to integers, with the stride from one member to the next
    offsets_stride: int
    begins: Any
    ends: Any
    lengths_stride: int
    cu_q: Any
    cu_q_stride: int
    cu_k: Any
    cu_k_stride: int


class Member(NamedTuple):
    """One member of the batch."""

    start_q: Any  # its first row in q
    seqlen_q: Any
    start_k: Any
    seqlen_k: Any
    begin: Any  # keys [begin, end) are real
    end: Any
    offset: Any  # int64: query i stands at key i + offset
    lower: Any  # int32 bounds of j - i
    upper: Any


class Tiles(NamedTuple):
    """Three consecutive ranges of tile starts: masked, seen in full, masked."""

    first: Any
    full: Any
    tail: Any
    last: Any


def sight(q: torch.Tensor, k: torch.Tensor, options: Options) -> Sight:
    packed = options.cu_seqlens_q is not None
    offset, lengths = options.offset, options.kv_lengths
    offset, offsets = (None, offset) if isinstance(offset, torch.Tensor) else (offset, None)
    ranged = lengths is not None and lengths.dim() == 2
    return Sight(
        seqlen_q=q.shape[0 if packed else 2],
        seqlen_k=k.shape[0 if packed else 2],
        batch=options.cu_seqlens_q.shape[0] - 1 if options.cu_seqlens_q is not None else q.shape[0],
        left=options.window_left,
        right=options.window_right,
        offset=offset,
        offsets=offsets,
        offsets_stride=0 if offsets is None else offsets.stride(0),
        begins=lengths[:, 0] if ranged else None,
        ends=lengths[:, 1] if ranged else lengths,
        lengths_stride=0 if lengths is None else lengths.stride(0),
        cu_q=options.cu_seqlens_q,
        cu_q_stride=0 if options.cu_seqlens_q is None else options.cu_seqlens_q.stride(0),
        cu_k=options.cu_seqlens_k,
        cu_k_stride=0 if options.cu_seqlens_k is None else options.cu_seqlens_k.stride(0),
    )


def first_phase(options: Options) -> int:
    """Which of the three ranges of key tiles can be the first: with a mask or a bias no tile is known to be seen in full."""
    if options.mask is not None or options.bias is not None:
        return 2
    return 0 if options.window_left is not None or (options.kv_lengths is not None and options.kv_lengths.dim() == 2) else 1


def first_phase_of_queries(options: Options) -> int:
    """The same for the query tiles of a key tile: a bound on the right hides keys from the first queries."""
    if options.mask is not None or options.bias is not None:
        return 2
    return 0 if options.window_right is not None else 1


def divides_tiles(options: Options) -> bool:
    """Whether a key can be seen by one row of a tile and hidden from another; keys outside [begin, end) are never loaded."""
    hiders = (options.window_left, options.window_right, options.mask, options.bias)
    return any(hider is not None for hider in hiders)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def read(pointer, index, stride, low, high):
    """An integer of the caller's, in [low, high] whatever it is."""
    return clamp(tl.load(pointer + tl.cast(index, tl.int64) * stride).to(tl.int64), low, high)


@triton.jit
def locate(sight, batch):
    start_q, seqlen_q, start_k, seqlen_k = 0, sight.seqlen_q, 0, sight.seqlen_k
    if sight.cu_q is not None:
        start_q = read(sight.cu_q, batch, sight.cu_q_stride, 0, sight.seqlen_q).to(tl.int32)
        seqlen_q = read(sight.cu_q, batch + 1, sight.cu_q_stride, start_q, sight.seqlen_q).to(tl.int32) - start_q
        start_k = read(sight.cu_k, batch, sight.cu_k_stride, 0, sight.seqlen_k).to(tl.int32)
        seqlen_k = read(sight.cu_k, batch + 1, sight.cu_k_stride, start_k, sight.seqlen_k).to(tl.int32) - start_k
    begin, end = 0, seqlen_k
    if sight.begins is not None:
        begin = read(sight.begins, batch, sight.lengths_stride, 0, seqlen_k).to(tl.int32)
    if sight.ends is not None:
        end = read(sight.ends, batch, sight.lengths_stride, 0, seqlen_k).to(tl.int32)
    offset = tl.cast(end, tl.int64) - seqlen_q
    if sight.offset is not None:
        offset = tl.cast(sight.offset, tl.int64)
    if sight.offsets is not None:
        offset = read(sight.offsets, batch, sight.offsets_stride, -FAR, FAR)
    lower, upper = 0, 0
    if sight.left is not None:
        lower = clamp(offset - sight.left, -FARTHEST_PAIR, FARTHEST_PAIR).to(tl.int32)
    if sight.right is not None:
        upper = clamp(offset + sight.right, -FARTHEST_PAIR, FARTHEST_PAIR).to(tl.int32)
    return Member(start_q, seqlen_q, start_k, seqlen_k, begin, end, offset, lower, upper)


@triton.jit
def find_tile(cu_seqlens, stride, batch, total, slot, BLOCK: tl.constexpr):
    """The member and the first row in it of a packed tile.

    Member b owns the slots from cu_seqlens[b] // BLOCK + b on: one for each BLOCK of its rows, and one for what is left.
    """
    low, high = 0, batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = read(cu_seqlens, middle, stride, 0, total) // BLOCK + middle <= slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    first = read(cu_seqlens, low, stride, 0, total) // BLOCK + low
    return low, (tl.maximum(slot - first, 0) * BLOCK).to(tl.int32)


def programs(seqlen: int, batch: int, cu_seqlens: torch.Tensor | None, block: int) -> int:
    """How many tiles of rows every head has; of packed rows an upper bound, so that nobody has to ask the device."""
    if cu_seqlens is None:
        return -(-seqlen // block) * batch  # triton.cdiv costs 3 us here
    return seqlen // block + batch if batch else 0


@triton.jit
def query_tile(sight, heads, BLOCK_M: tl.constexpr):
    """The (batch, head, start_m) of this program; start_m may lie past the member's last query."""
    program = tl.program_id(0)
    if sight.cu_q is not None:
        slots = sight.seqlen_q // BLOCK_M + sight.batch
        batch, start_m = find_tile(sight.cu_q, sight.cu_q_stride, sight.batch, sight.seqlen_q, program % slots, BLOCK_M)
        return batch, program // slots, start_m
    tiles = tl.cdiv(sight.seqlen_q, BLOCK_M)
    tile = program % tiles
    if sight.right is not None:
        tile = tiles - 1 - tile  # the longest rows of a causal head start first
    return program // tiles // heads, program // tiles % heads, tile * BLOCK_M


@triton.jit
def key_tile(sight, kv_heads, BLOCK_N: tl.constexpr):
    """The (batch, kv_head, start_n) of this program; start_n may lie past the member's last key."""
    program = tl.program_id(0)
    if sight.cu_k is not None:
        slots = sight.seqlen_k // BLOCK_N + sight.batch
        batch, start_n = find_tile(sight.cu_k, sight.cu_k_stride, sight.batch, sight.seqlen_k, program % slots, BLOCK_N)
        return batch, program // slots, start_n
    tiles = tl.cdiv(sight.seqlen_k, BLOCK_N)
    return program // tiles // kv_heads, program // tiles % kv_heads, program % tiles * BLOCK_N


@triton.jit
def visible(sight, member, mask, batch, head, rows, cols):
    """True where a pair is visible; rows and cols are index tensors that broadcast against each other, either way round."""
    seen = (cols < member.end) & (rows < member.seqlen_q)
    if sight.begins is not None:
        seen &= cols >= member.begin
    if sight.left is not None:
        seen &= cols - rows >= member.lower
    if sight.right is not None:
        seen &= cols - rows <= member.upper
    if mask is not None:
        seen &= tl.load(pair_pointers(mask, batch, head, rows, cols), mask=seen, other=0) != 0
    return seen


@triton.jit
def pair_pointers(x, batch, head, rows, cols):
    """Where a (batch, head, query, key) tensor holds its number for each pair."""
    return row_pointers(x, batch, head, 0) + rows.to(tl.int64) * x.seq + cols.to(tl.int64) * x.dim


@triton.jit
def key_tiles(sight, member, start_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles that the queries [start_m, start_m + BLOCK_M) visit, aligned to BLOCK_N."""
    last_row = tl.cast(tl.minimum(start_m + BLOCK_M, member.seqlen_q) - 1, tl.int64)
    low, high = tl.cast(member.begin, tl.int64), tl.cast(member.end, tl.int64)
    full_low, full_high = low, high
    if sight.left is not None:
        low = tl.maximum(low, tl.cast(start_m, tl.int64) + member.lower)
        full_low = tl.maximum(full_low, last_row + member.lower)
    if sight.right is not None:
        high = tl.minimum(high, last_row + member.upper + 1)
        full_high = tl.minimum(full_high, tl.cast(start_m, tl.int64) + member.upper + 1)
    return split(low, high, full_low, full_high, BLOCK_N)


@triton.jit
def query_tiles(sight, member, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query tiles that see the keys [start_n, start_n + BLOCK_N), aligned to BLOCK_M."""
    first_key = tl.cast(tl.maximum(start_n, member.begin), tl.int64)
    last_key = tl.cast(tl.minimum(start_n + BLOCK_N, member.end) - 1, tl.int64)
    zero = tl.cast(0, tl.int64)
    low, high = zero, tl.where(first_key <= last_key, tl.cast(member.seqlen_q, tl.int64), zero)
    whole = (start_n >= member.begin) & (start_n + BLOCK_N <= member.end)
    full_low, full_high = zero, tl.where(whole, high, zero)
    if sight.right is not None:
        low = tl.maximum(low, first_key - member.upper)
        full_low = tl.maximum(full_low, last_key - member.upper)
    if sight.left is not None:
        high = tl.minimum(high, last_key - member.lower + 1)
        full_high = tl.minimum(full_high, first_key - member.lower + 1)
    return split(low, high, full_low, full_high, BLOCK_M)


@triton.jit
def split(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Tiles that hold [low, high), and among them those inside [full_low, full_high)."""
    low = tl.maximum(low, 0)
    high = tl.where(low < high, high, 0)
    low = tl.minimum(low, high)  # and so every bound below fits into 32 bits
    first = low // BLOCK * BLOCK
    full = tl.maximum((tl.maximum(full_low, 0) + BLOCK - 1) // BLOCK * BLOCK, first)
    tail = tl.maximum(tl.maximum(full_high, 0) // BLOCK * BLOCK, full)
    return Tiles(first.to(tl.int32), tl.minimum(full, high).to(tl.int32), tl.minimum(tail, high).to(tl.int32), high.to(tl.int32))


@triton.jit
def phase(tiles, PHASE: tl.constexpr, FIRST: tl.constexpr):
    """The masked tiles before those seen in full (0), these (1), or the masked ones after (2), from the first possible range on."""
    low, high = tiles.first, tiles.last
    if PHASE == 0:
        high = tiles.full
    elif PHASE == 1:
        high = tiles.tail
    if PHASE != FIRST:
        low = tiles.full if PHASE == 1 else tiles.tail
    return low, high
