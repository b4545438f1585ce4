"""Gradients of keys and values with queries by TMA: twice the queries a tile of the product's kernel, whose tiles shared memory bounds.

    p = exp(s - lse),   ds = p (dout v^T - delta),   dv = p^T dout,   dk = scale ds^T q        transposed tiles: (keys, queries)

One loop masks every tile, which costs less than the
registers of a second; where p comes straight from the exponential, or lse and delta by TMA, Triton serializes the products. The longest
columns of a causal head come first. Of the options it takes causal, scale and the lengths alone. Not timed on any GPU yet.

Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fused_attention.triton_kernels import mask as masks
from fused_attention.triton_kernels.launch import launch
from fused_attention.triton_kernels.options import Options
from fused_attention.triton_kernels.softmax import LOG2_E
from fused_attention.triton_kernels.tensor import load_numbers, load_tile, rows_view, store_tile, view
from fused_attention.triton_kernels.tiles import TileConfig

from . import calls, order
from .s_ahead import descriptor, load_keys

TILES = {64: TileConfig(64, 128, 8, 2), 128: TileConfig(64, 128, 8, 2), 256: TileConfig(64, 64, 8, 2)}


def key_value(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, options: Options,
) -> None:  # fmt: skip
    """Write dk and dv; delta: rowsum(dout out), as lse (batch, heads, seqlen_q). NotImplementedError where calls.check refuses."""
    calls.check(k, q, dout, options)
    tile, (batch, kv_heads, seqlen_k, head_dim) = TILES[q.shape[-1]], k.shape
    key_tiles, group = -(-seqlen_k // tile.block_n), q.shape[1] // kv_heads
    launch(
        tma_key_value_kernel, batch * kv_heads * key_tiles, q.device, descriptor(q, tile.block_m), view(k), view(v),
        descriptor(dout, tile.block_m), rows_view(lse), rows_view(delta), view(dk), view(dv), masks.sight(q, k, options),
        options.scale, kv_heads, batch * kv_heads, key_tiles, order.section(2 * group * q[0, 0].nbytes, batch * kv_heads),
        GROUP=group, HEAD_DIM=head_dim, CAUSAL=options.window_right is not None, **tile.constants(),
    )  # fmt: skip


@triton.jit
def tma_key_value_kernel(
    q, k, v, dout, lse, delta, dk, dv, sight, scale, kv_heads, batch_heads, key_tiles, section,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N rows of dk and dv of one key head, over all queries of its group."""
    place, tile = order.row_tile(tl.program_id(0), batch_heads, key_tiles, section)
    batch, kv_head, start_n = place // kv_heads, place % kv_heads, (key_tiles - 1 - tile) * BLOCK_N
    member, last = masks.locate(sight, batch), sight.seqlen_k - start_n
    (k_tile,) = load_tile(k, batch, kv_head, start_n, 0, last, BLOCK_N, HEAD_DIM)
    (v_tile,) = load_tile(v, batch, kv_head, start_n, 0, last, BLOCK_N, HEAD_DIM)
    dk_acc, dv_acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32), tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    cols = start_n + tl.arange(0, BLOCK_N)[:, None]
    tiles = masks.query_tiles(sight, member, start_n, BLOCK_M, BLOCK_N)

    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for start_m in tl.range(tiles.first, tiles.last, BLOCK_M):
            q_tile = load_keys(q, batch, head, start_m, BLOCK_M, HEAD_DIM)
            row_lse = load_numbers(lse, batch, head, start_m, sight.seqlen_q - start_m, float("inf"), BLOCK_M)
            # Of a row that sees nothing lse is -inf, and the select hides what that makes of p.
            p = tl.exp2(tl.dot(k_tile, q_tile.T) * (scale * LOG2_E) - (row_lse * LOG2_E)[None, :])
            rows = (start_m + tl.arange(0, BLOCK_M))[None, :]
            p = tl.where(cols - rows <= member.upper if CAUSAL else rows < sight.seqlen_q, p, 0.0)
            dout_tile = load_keys(dout, batch, head, start_m, BLOCK_M, HEAD_DIM)
            dp = tl.dot(v_tile, dout_tile.T)
            dv_acc = tl.dot(p.to(q_tile.dtype), dout_tile, dv_acc)
            row_delta = load_numbers(delta, batch, head, start_m, sight.seqlen_q - start_m, 0.0, BLOCK_M)
            ds = p * (dp - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc)

    store_tile(dk, batch, kv_head, start_n, last, (dk_acc * scale,), BLOCK_N, HEAD_DIM)
    store_tile(dv, batch, kv_head, start_n, last, (dv_acc,), BLOCK_N, HEAD_DIM)
