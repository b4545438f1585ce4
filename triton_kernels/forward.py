"""Fused attention, forward: out = softmax(scores) v and the lse of each row, without ever storing the scores.

Source: Dao, "FlashAttention-2", 2023, algorithm 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dropout as drop
from . import mask as masks
from . import matmul, scores, softmax
from . import visits as visit
from .launch import launch
from .options import Options
from .softmax import LOG2_E
from .tensor import broadcast_view, load_tile, rows_view, store_numbers, store_tile, view
from .tiles import TileConfig


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, options: Options, tile: TileConfig
) -> None:
    """Write out, laid out at will, and lse (batch, heads, seqlen_q), or of packed sequences (heads, total)."""
    sight, sinks, heads = masks.sight(q, k, options), options.sinks, q.shape[1]
    programs = masks.programs(sight.seqlen_q, sight.batch, sight.cu_q, tile.block_m) * heads
    launch(
        forward_kernel, programs, q.device, view(q), view(k), view(v), view(out), rows_view(lse), sight,
        scores.terms(options.scale, options.softcap, options.alibi_slopes), broadcast_view(options.mask), broadcast_view(options.bias),
        visit.of_keys(options.mask, tile.block_m, tile.block_n),
        sinks, 0 if sinks is None else sinks.stride(0), drop.dropout(options), heads,
        GROUP=heads // k.shape[1], HEAD_DIM=q.shape[-1], HEAD_DIM_V=v.shape[-1], FIRST=masks.first_phase(options),
        DIVIDED=masks.divides_tiles(options), **tile.constants(),
    )  # fmt: skip


@triton.jit
def forward_kernel(
    q, k, v, out, lse, sight, terms, mask, bias, visits, sinks, sinks_stride, dropout, heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, FIRST: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head."""
    ACC: tl.constexpr = matmul.accumulate_dtype(q.ptr.dtype.element_ty)
    UNIT: tl.constexpr = 1.0 if bias is not None else LOG2_E
    batch, head, start_m = masks.query_tile(sight, heads, BLOCK_M)
    member = masks.locate(sight, batch)
    if start_m >= member.seqlen_q:
        return
    rows = start_m + tl.arange(0, BLOCK_M)[:, None]
    q_tile = load_tile(q, batch, head, member.start_q + start_m, 0, member.seqlen_q - start_m, BLOCK_M, HEAD_DIM)
    slope = scores.slope(terms, batch, head, ACC)
    acc, row_max, row_sum = softmax.start(softmax.sink(sinks, sinks_stride, head, ACC), UNIT, BLOCK_M, HEAD_DIM_V, ACC)

    # Up to three loops with one body: most tiles are seen in full and skip the mask.
    tiles = masks.key_tiles(sight, member, start_m, BLOCK_M, BLOCK_N)
    listed = visit.find(visits, batch, head, start_m, BLOCK_M)
    for PHASE in tl.static_range(FIRST, 3):
        low, high = masks.phase(tiles, PHASE, FIRST)
        low, high = visit.turns(visits, listed, low, high, BLOCK_N)
        for turn in tl.range(low, high, BLOCK_N):
            start_n = visit.start(visits, listed, turn, BLOCK_N)
            at, first, last = member.start_k + start_n, member.begin - start_n, member.end - start_n
            k_tile = load_tile(k, batch, head // GROUP, at, first, last, BLOCK_N, HEAD_DIM)
            v_tile = load_tile(v, batch, head // GROUP, at, first, last, BLOCK_N, HEAD_DIM_V)
            cols = start_n + tl.arange(0, BLOCK_N)[None, :]
            seen = masks.visible(sight, member, mask, batch, head, rows, cols) if PHASE != 1 else None
            products = matmul.contract(q_tile, k_tile, PRECISION)
            capped = scores.cap(products, terms, UNIT)
            s = scores.score(capped, slope, bias, member, batch, head, rows, cols, seen, UNIT)
            if PHASE != 1 and DIVIDED:
                v_tile, broken = matmul.finite_rows(v_tile)
                acc = matmul.poison_rows(acc, s, broken)
            factor = drop.factor(dropout, batch * heads + head, rows, start_n, ACC, BLOCK_N)
            acc, row_max, row_sum = softmax.update(acc, row_max, row_sum, s, v_tile, factor, UNIT, PRECISION)

    out_tile, row_lse = softmax.finish(acc, row_max, row_sum, UNIT)
    store_tile(out, batch, head, member.start_q + start_m, member.seqlen_q - start_m, out_tile, BLOCK_M, HEAD_DIM_V)
    store_numbers(lse, batch, head, member.start_q + start_m, member.seqlen_q - start_m, row_lse, BLOCK_M)
