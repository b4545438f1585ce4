"""The gradient of a bias, summed over every dimension in which the bias repeats, in a fixed order.

One value a query or a key: the passes of the backward sum rows or columns of ds as they go. One a pair: a pass of its own, in which
each program owns a tile of the bias and visits the members and heads that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import dropout as drop
from . import mask as masks
from . import matmul, scores
from .differentiate import Operands, probabilities, score_gradients
from .launch import launch
from .tensor import broadcast_view, load_numbers, load_tile
from .tiles import TileConfig


class Shares(NamedTuple):
    """Where the passes leave their sums of ds; one of the three at most."""

    rows: torch.Tensor | None = None  # (batch, heads, seqlen_q), summed over keys
    columns: torch.Tensor | None = None  # (batch, heads, seqlen_k), summed over queries
    pairs: torch.Tensor | None = None  # the gradient itself

    @classmethod
    def of(cls, bias: torch.Tensor | None, lse: torch.Tensor, k: torch.Tensor) -> Shares:
        if bias is None:
            return cls()
        if bias.shape[-1] == 1:
            return cls(rows=torch.empty_like(lse))
        if bias.shape[-2] == 1:
            return cls(columns=lse.new_empty(*lse.shape[:2], k.shape[2]))
        return cls(pairs=torch.empty_like(bias))

    def gradient(self, bias: torch.Tensor) -> torch.Tensor | None:
        """In the bias's shape and dtype."""
        if self.rows is not None:
            share = self.rows[..., None]
        elif self.columns is not None:
            share = self.columns[..., None, :]
        else:
            return self.pairs
        shape = bias.shape if bias.dim() == 4 else (1, 1, *bias.shape)
        return share.sum_to_size(shape).reshape(bias.shape).to(bias.dtype)


def pair_pass(operands: Operands, dbias: torch.Tensor, heads: int, tile: TileConfig, shape: dict[str, int]) -> None:
    sight, mask = operands.sight, operands.mask
    batches, bias_heads = dbias.shape[:2] if dbias.dim() == 4 else (1, 1)
    tiles = -(-sight.seqlen_q // tile.block_m) * -(-sight.seqlen_k // tile.block_n)
    launch(
        bias_kernel, batches * bias_heads * tiles, dbias.device, *operands, broadcast_view(dbias), batches, bias_heads, heads,
        # Where several heads share the tile, they have to share the mask, for it to hide the tile from all of them.
        GATED=mask is not None and (mask.head == 0 or bias_heads == heads), **shape, **tile.constants(),
    )  # fmt: skip


@triton.jit
def bias_kernel(
    q, k, v, dout, lse, delta, sight, terms, mask, bias, dropout, dbias, dbias_batches, dbias_heads, heads,
    GATED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of a (seqlen_q, seqlen_k) bias gradient, summed over the members and heads that share the bias."""
    ACC: tl.constexpr = matmul.accumulate_dtype(q.ptr.dtype.element_ty)
    tiles_m, tiles_n = tl.cdiv(sight.seqlen_q, BLOCK_M), tl.cdiv(sight.seqlen_k, BLOCK_N)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    owner = tl.program_id(0) // (tiles_m * tiles_n)
    start_m, start_n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
    rows = start_m + tl.arange(0, BLOCK_M)[:, None]
    cols = start_n + tl.arange(0, BLOCK_N)[None, :]
    last_m = sight.seqlen_q - start_m
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for batch in range(owner // dbias_heads, sight.batch, dbias_batches):
        member = masks.locate(sight, batch)
        visited = masks.key_tiles(sight, member, start_m, BLOCK_M, BLOCK_N)
        sees = (start_n < visited.last) & (start_n + BLOCK_N > visited.first)
        if GATED:
            seen = masks.visible(sight, member, mask, batch, owner % dbias_heads, rows, cols)
            sees &= tl.max(tl.max(seen.to(tl.int32), 1), 0) != 0
        first_head = tl.where(sees, owner % dbias_heads, heads)  # or none at all
        for head in range(first_head, heads, dbias_heads):
            slope = scores.slope(terms, batch, head, ACC)
            first, last = member.begin - start_n, member.end - start_n
            q_tile = load_tile(q, batch, head, start_m, 0, last_m, BLOCK_M, HEAD_DIM)
            dout_tile = load_tile(dout, batch, head, start_m, 0, last_m, BLOCK_M, HEAD_DIM_V)
            k_tile = load_tile(k, batch, head // GROUP, start_n, first, last, BLOCK_N, HEAD_DIM)
            v_tile = load_tile(v, batch, head // GROUP, start_n, first, last, BLOCK_N, HEAD_DIM_V)
            row_lse = load_numbers(lse, batch, head, start_m, last_m, float("inf"), BLOCK_M)[:, None]
            row_delta = load_numbers(delta, batch, head, start_m, last_m, 0.0, BLOCK_M)[:, None]
            seen = masks.visible(sight, member, mask, batch, head, rows, cols)
            products = matmul.contract(q_tile, k_tile, PRECISION)
            capped = scores.cap(products, terms, 1.0)
            s = scores.score(capped, slope, bias, member, batch, head, rows, cols, seen, 1.0)
            factor = drop.factor(dropout, batch * heads + head, rows, start_n, ACC, BLOCK_N)
            dp = matmul.contract(dout_tile, v_tile, PRECISION)
            total += score_gradients(probabilities(s, row_lse, 1.0), dp, row_delta, factor, s, True)
    pointers = masks.pair_pointers(dbias, owner // dbias_heads, owner % dbias_heads, rows, cols)
    tl.store(pointers, total.to(dbias.ptr.dtype.element_ty), mask=(rows < sight.seqlen_q) & (cols < sight.seqlen_k))
