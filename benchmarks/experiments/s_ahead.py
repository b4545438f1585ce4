"""Forward with the scores of the next tile issued ahead of this tile's softmax, so that the tensor cores work beside it.

    s = q k0^T;   for each tile:   ahead = q k_next^T,   (acc, max, sum) = softmax.update(acc, max, sum, s, v),   s = ahead

Keys and values come by TMA; tiles that need a mask come before the others, so that the loop that matters ends a row. Of the options it
takes causal, scale and the lengths alone. Not timed on any GPU yet.

Source: Shah et al., "FlashAttention-3", 2024, section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fused_attention.triton_kernels import mask as masks
from fused_attention.triton_kernels import softmax
from fused_attention.triton_kernels.launch import launch
from fused_attention.triton_kernels.options import Options
from fused_attention.triton_kernels.softmax import LOG2_E
from fused_attention.triton_kernels.tensor import load_tile, rows_view, store_numbers, store_tile, view
from fused_attention.triton_kernels.tiles import TileConfig
from triton.tools.tensor_descriptor import TensorDescriptor

from . import calls, order

# The largest tiles whose loops do not spill under Triton 3.6.0 and 3.7.1.
TILES = {64: TileConfig(128, 128, 8, 2), 128: TileConfig(128, 128, 8, 2), 256: TileConfig(128, 64, 8, 2)}


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, options: Options) -> None:
    """As triton_kernels.forward, of tensors (batch, heads, seqlen, head_dim); NotImplementedError where calls.check refuses."""
    calls.check(q, k, v, options)
    tile, (batch, heads, seqlen_q, head_dim) = TILES[q.shape[-1]], q.shape
    row_tiles = -(-seqlen_q // tile.block_m)
    launch(
        s_ahead_forward_kernel, batch * heads * row_tiles, q.device, view(q), descriptor(k, tile.block_n), descriptor(v, tile.block_n),
        view(out), rows_view(lse), masks.sight(q, k, options), options.scale * LOG2_E.value,
        heads, batch * heads, row_tiles, order.section(2 * k[0, 0].nbytes, batch * k.shape[1]) * (heads // k.shape[1]),
        GROUP=heads // k.shape[1], HEAD_DIM=head_dim, **tile.constants(),
    )  # fmt: skip


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of some rows of a head; rows past the last one read as zero, for the next head is another place."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]])


@triton.jit
def s_ahead_forward_kernel(
    q, k, v, out, lse, sight, unit, heads, batch_heads, row_tiles, section,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head."""
    place, row = order.row_tile(tl.program_id(0), batch_heads, row_tiles, section)
    batch, head, start_m = place // heads, place % heads, row * BLOCK_M
    member = masks.locate(sight, batch)
    (q_tile,) = load_tile(q, batch, head, start_m, 0, sight.seqlen_q - start_m, BLOCK_M, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    tiles = masks.key_tiles(sight, member, start_m, BLOCK_M, BLOCK_N)

    for start_n in tl.range(tiles.tail, tiles.last, BLOCK_N):
        products = tl.dot(q_tile, load_keys(k, batch, head // GROUP, start_n, BLOCK_N, HEAD_DIM).T)
        rows, cols = start_m + tl.arange(0, BLOCK_M)[:, None], start_n + tl.arange(0, BLOCK_N)[None, :]
        products = tl.where(masks.visible(sight, member, None, batch, head, rows, cols), products, float("-inf"))
        p, acc, row_max, row_sum = weigh(products, acc, row_max, row_sum, unit)
        acc = tl.dot(p.to(q_tile.dtype), load_keys(v, batch, head // GROUP, start_n, BLOCK_N, HEAD_DIM), acc)

    if tiles.tail > 0:
        products = tl.dot(q_tile, load_keys(k, batch, head // GROUP, 0, BLOCK_N, HEAD_DIM).T)
        for start_n in tl.range(0, tiles.tail - BLOCK_N, BLOCK_N):
            ahead = tl.dot(q_tile, load_keys(k, batch, head // GROUP, start_n + BLOCK_N, BLOCK_N, HEAD_DIM).T)
            p, acc, row_max, row_sum = weigh(products, acc, row_max, row_sum, unit)
            acc = tl.dot(p.to(q_tile.dtype), load_keys(v, batch, head // GROUP, start_n, BLOCK_N, HEAD_DIM), acc)
            products = ahead
        p, acc, row_max, row_sum = weigh(products, acc, row_max, row_sum, unit)
        acc = tl.dot(p.to(q_tile.dtype), load_keys(v, batch, head // GROUP, tiles.tail - BLOCK_N, BLOCK_N, HEAD_DIM), acc)

    out_tile, row_lse = softmax.finish((acc,), row_max, row_sum, LOG2_E)
    store_tile(out, batch, head, start_m, sight.seqlen_q - start_m, out_tile, BLOCK_M, HEAD_DIM)
    store_numbers(lse, batch, head, start_m, sight.seqlen_q - start_m, row_lse, BLOCK_M)


@triton.jit
def load_keys(x, batch, kv_head, start, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of k or v."""
    return x.load([batch, kv_head, start, 0]).reshape(ROWS, HEAD_DIM)


@triton.jit
def weigh(products, acc, row_max, row_sum, unit):
    """The weights of a tile, and what came before in their measure; unit > 0 is what products are multiplied with, beside log2(e)."""
    new_max = tl.maximum(row_max, tl.max(products, 1) * unit)
    pivot = softmax.finite_pivot(new_max)
    p = tl.exp2(products * unit - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    return p, acc * rescale[:, None], new_max, row_sum * rescale + tl.sum(p, 1)
