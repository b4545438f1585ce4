"""Fused attention of few queries, forward: the keys are split over programs, whose results are then combined.

    out = sum_s exp(lse_s - lse) out_s,     lse = log sum_s exp(lse_s)

The queries of all heads that share a key head are packed into the rows of one tile, so that every key is read once. A split holds
SPLIT keys whatever the batch and however many keys there are: a row's bits depend on its own sequence alone. With sinks they depend also
on whether there is more than one split, for a single one adds the sink itself, and of several their combination does. That is not the
sequence's own: it follows from the keys that the call is shown, or from the window if that is narrower; of pages from page_size times the
columns of the table.
Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dropout as drop
from . import mask as masks
from . import matmul, scores, softmax
from . import pages as paging
from . import visits as visit
from .launch import launch
from .options import Options
from .softmax import LOG2_E
from .tensor import broadcast_view, load_numbers, load_rows, load_tile, row_pointers, rows_view, store_numbers, store_rows, store_tile, view
from .tiles import TileConfig

SPLIT = 512  # keys


def suits(seqlen_q: int, group: int, packed: bool, tile: TileConfig) -> bool:
    """Whether the queries that share a key head fit into one tile, of at most tile.block_m rows."""
    return not packed and seqlen_q * group <= tile.block_m


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    tile: TileConfig,
    page_table: torch.Tensor | None = None,
) -> None:
    """Write out and lse (batch, heads, seqlen_q), as forward does, with a tile that suits.

    With a page_table, int32 (batch, pages of a member), k and v are (pages, kv_heads, page_size, head_dim or head_dim_v), and a member has
    page_size keys for each of its pages.
    """
    (batch, heads, seqlen_q, head_dim), (_, kv_heads, seqlen_k, head_dim_v) = q.shape, v.shape
    group = heads // kv_heads
    block_m = max(16, 1 << (seqlen_q * group - 1).bit_length())
    sight, page_size = masks.sight(q, k, options), None
    if page_table is not None:
        page_size, seqlen_k = seqlen_k, seqlen_k * page_table.shape[1]
        sight = sight._replace(seqlen_k=seqlen_k)
        tile = tile._replace(num_warps=paging.warps(tile, block_m, max(head_dim, head_dim_v), q.element_size()))
    splits = max(1, -(-_most_keys(seqlen_q, seqlen_k, tile.block_n, options) // SPLIT))
    parts, part_lses, sinks = out, lse, options.sinks
    if splits > 1:
        parts = out.new_empty(batch, heads, seqlen_q * splits, head_dim_v, dtype=lse.dtype)
        part_lses = lse.new_empty(batch, heads, seqlen_q * splits)
        sinks = None  # the combination adds them, once
    launch(
        split_kernel, batch * kv_heads * splits if seqlen_q else 0, q.device, view(q), view(k), view(v), view(parts), rows_view(part_lses),
        paging.pages(page_table, k), sight, scores.terms(options.scale, options.softcap, options.alibi_slopes),
        broadcast_view(options.mask), broadcast_view(options.bias), visit.of_keys(options.mask, block_m, tile.block_n, group),
        sinks, 0 if sinks is None else sinks.stride(0), drop.dropout(options), kv_heads, splits,
        GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, PAGE_SIZE=page_size, SPLIT=SPLIT, FIRST=masks.first_phase(options),
        DIVIDED=masks.divides_tiles(options),
        **tile.constants() | {"BLOCK_M": block_m},
    )  # fmt: skip
    if splits > 1:
        sinks = options.sinks
        launch(
            combine_kernel, batch * heads * seqlen_q, q.device, view(parts), rows_view(part_lses), view(out), rows_view(lse),
            sinks, 0 if sinks is None else sinks.stride(0), heads, seqlen_q, splits, HEAD_DIM_V=head_dim_v, BLOCK=16,
        )  # fmt: skip


def _most_keys(seqlen_q: int, seqlen_k: int, block_n: int, options: Options) -> int:
    """How many keys the queries can see together, counted from the start of a tile."""
    if options.window_left is None or options.window_right is None:
        return seqlen_k
    return min(seqlen_k, options.window_left + options.window_right + seqlen_q + block_n - 1)


@triton.jit
def split_kernel(
    q, k, v, out, lse, pages, sight, terms, mask, bias, visits, sinks, sinks_stride, dropout, kv_heads, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, FIRST: tl.constexpr,
    DIVIDED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes all queries of one kv head over SPLIT keys; row i of a head and split s go to row i * splits + s."""
    ACC: tl.constexpr = matmul.accumulate_dtype(q.ptr.dtype.element_ty)
    UNIT: tl.constexpr = 1.0 if bias is not None else LOG2_E
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(0) // splits % kv_heads
    batch = tl.program_id(0) // splits // kv_heads
    member = masks.locate(sight, batch)
    inside = tl.arange(0, BLOCK_M)[:, None] < GROUP * sight.seqlen_q
    packed = tl.minimum(tl.arange(0, BLOCK_M), GROUP * sight.seqlen_q - 1)  # rows past the last repeat it and are not stored
    head = (kv_head * GROUP + packed // sight.seqlen_q)[:, None]
    rows = (packed % sight.seqlen_q)[:, None]
    q_tile = load_rows(q, row_pointers(q, batch, head, rows), inside, HEAD_DIM)
    slope = scores.slope(terms, batch, head, ACC)
    sink = softmax.sink(sinks, sinks_stride, kv_head * GROUP + packed // sight.seqlen_q, ACC)
    acc, row_max, row_sum = softmax.start(sink, UNIT, BLOCK_M, HEAD_DIM_V, ACC)

    tiles = masks.key_tiles(sight, member, 0, BLOCK_M, BLOCK_N)
    begin = tiles.first + split * SPLIT
    listed = visit.find(visits, batch, kv_head, 0, BLOCK_M)
    for PHASE in tl.static_range(FIRST, 3):
        low, high = masks.phase(tiles, PHASE, FIRST)
        low, high = visit.turns(visits, listed, tl.maximum(low, begin), tl.minimum(high, begin + SPLIT), BLOCK_N)
        for turn in tl.range(low, high, BLOCK_N):
            start_n = visit.start(visits, listed, turn, BLOCK_N)
            first, last = member.begin - start_n, member.end - start_n
            page, slot = paging.find(pages, batch, start_n, first, last, PAGE_SIZE, BLOCK_N)
            k_tile = paging.load(k, page, slot, kv_head, first, last, PAGE_SIZE, BLOCK_N, HEAD_DIM)
            v_tile = paging.load(v, page, slot, kv_head, first, last, PAGE_SIZE, BLOCK_N, HEAD_DIM_V)
            cols = start_n + tl.arange(0, BLOCK_N)[None, :]
            seen = masks.visible(sight, member, mask, batch, head, rows, cols) if PHASE != 1 else None
            products = matmul.contract(q_tile, k_tile, PRECISION)
            capped = scores.cap(products, terms, UNIT)
            s = scores.score(capped, slope, bias, member, batch, head, rows, cols, seen, UNIT)
            if PHASE != 1 and DIVIDED:
                v_tile, broken = matmul.finite_rows(v_tile)
                acc = matmul.poison_rows(acc, s, broken)
            factor = drop.factor(dropout, batch * (kv_heads * GROUP) + head, rows, start_n, ACC, BLOCK_N)
            acc, row_max, row_sum = softmax.update(acc, row_max, row_sum, s, v_tile, factor, UNIT, PRECISION)

    out_tile, row_lse = softmax.finish(acc, row_max, row_sum, UNIT)
    place = rows * splits + split
    store_rows(out, row_pointers(out, batch, head, place), inside, out_tile, HEAD_DIM_V)
    tl.store(row_pointers(lse, batch, head, place), row_lse[:, None], mask=inside)


@triton.jit
def combine_kernel(parts, part_lses, out, lse, sinks, sinks_stride, heads, seqlen_q, splits, HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr):
    """One program combines the splits of one row, BLOCK at a time."""
    ACC: tl.constexpr = part_lses.ptr.dtype.element_ty
    row = tl.program_id(0) % seqlen_q
    head = tl.program_id(0) // seqlen_q % heads
    batch = tl.program_id(0) // seqlen_q // heads
    acc, row_max, row_sum = softmax.start(softmax.sink(sinks, sinks_stride, head, ACC), 1.0, 1, HEAD_DIM_V, ACC)
    for start in range(0, splits, BLOCK):
        tile = load_tile(parts, batch, head, row * splits + start, 0, splits - start, BLOCK, HEAD_DIM_V)
        part_lse = load_numbers(part_lses, batch, head, row * splits + start, splits - start, float("-inf"), BLOCK)
        acc, row_max, row_sum = softmax.merge(acc, row_max, row_sum, part_lse, tile)
    out_tile, row_lse = softmax.finish(acc, row_max, row_sum, 1.0)
    store_tile(out, batch, head, row, 1, out_tile, 1, HEAD_DIM_V)
    store_numbers(lse, batch, head, row, 1, row_lse, 1)
