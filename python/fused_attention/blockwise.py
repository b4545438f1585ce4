"""Attention by tiles in plain PyTorch, forward and backward: any option, any device, memory O(seqlen).

    online softmax    m' = max(m, rowmax(s));  l' = l e^(m - m') + rowsum(e^(s - m'));  acc' = acc e^(m - m') + e^(s - m') v
    gradients         p = e^(s - lse);  ds = p (dout v^T - delta),  delta = rowsum(dout out) - dlse

Sources: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe, Staats, "Self-attention does not need
O(n^2) memory", 2021; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import scores as pairs
from .problem import AttentionOutput, Gradients, Problem
from .scores import NEG_INF, Geometry, Tile

BLOCK = 512  # queries and keys a tile: the scores of a tile stay in a core's share of the cache


def forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
    """out and lse; written without in-place updates, so that every transform of PyTorch can differentiate it."""
    where = pairs.locate(problem)
    q, k, v = (pairs.dense(tensor, problem) for tensor in (q, k, v))
    parts = [_forward_rows(q, k, v, problem, where, rows) for rows in _blocks(problem.seqlen_q)]
    out, lse = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    out = out.to(problem.dtype)
    return AttentionOutput(out[0].transpose(0, 1), lse[0]) if problem.packed else AttentionOutput(out, lse)


def _forward_rows(q: Tensor, k: Tensor, v: Tensor, problem: Problem, where: Geometry, rows: slice) -> AttentionOutput:
    q = q[:, :, rows].to(problem.accumulate_dtype)
    slopes = None if problem.alibi_slopes is None else pairs.slopes_by_row(problem.alibi_slopes.to(q.dtype), problem, where)
    row_max, row_sum = _start(q, problem)
    acc = q.new_zeros(*q.shape[:3], problem.head_dim_v)
    poisoned = q.new_zeros(q.shape[:3], dtype=torch.bool)
    for cols in _key_blocks(problem, where, rows):
        tile = Tile(rows, cols)
        visible = pairs.visible(problem, where, tile)
        k_tile, v_tile = (tensor[:, :, cols].to(q.dtype) for tensor in (k, v))
        if visible is not None:
            k_tile, k_broken = pairs.finite_rows(k_tile, problem.group)
            v_tile, v_broken = pairs.finite_rows(v_tile, problem.group)
            poisoned = poisoned | (visible & v_broken).any(-1)
        s = pairs.cap(pairs.query_key(q, k_tile) * problem.scale, problem.softcap)
        shifts = (None if x is None else pairs.part(x, tile).to(q.dtype) for x in (slopes, problem.bias))
        s = pairs.shift(s, pairs.distance(problem, where, tile), *shifts)
        if visible is not None:
            s = s.masked_fill(k_broken, torch.nan).masked_fill(~visible, NEG_INF)
        new_max = torch.maximum(row_max, s.detach().amax(-1))
        pivot = _finite_pivot(new_max)
        p = torch.exp(s - pivot[..., None])
        rescale = torch.exp(row_max - pivot)
        factor = pairs.dropout_factor(problem, where, tile)
        row_sum = row_sum * rescale + p.sum(-1)
        acc = acc * rescale[..., None] + pairs.weights_value(p if factor is None else p * factor, v_tile)
        row_max = new_max
    return _finish(row_max, row_sum, acc, poisoned)


def _start(q: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """row_max and row_sum before the first key: nothing, or the sink."""
    if problem.sinks is None:
        return q.new_full(q.shape[:3], NEG_INF), q.new_zeros(q.shape[:3])
    sinks = problem.sinks.to(q.dtype)[None, :, None].expand(q.shape[:3])
    row_max = sinks.detach()
    return row_max, torch.exp(sinks - _finite_pivot(row_max))


def _finish(row_max: Tensor, row_sum: Tensor, acc: Tensor, poisoned: Tensor) -> AttentionOutput:
    empty = row_sum == 0
    total = torch.where(empty, 1.0, row_sum)
    out = acc / total[..., None]
    lse = torch.where(empty, NEG_INF, _finite_pivot(row_max) + torch.log(total))
    return AttentionOutput(out.masked_fill(poisoned[..., None], torch.nan), lse)


def _finite_pivot(row_max: Tensor) -> Tensor:
    # -inf - -inf would be nan: a row that has seen no key keeps a finite pivot.
    return torch.where(row_max == NEG_INF, 0.0, row_max)


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> Gradients:
    """The gradients that problem.gradients names, of a forward whose out and lse are given; reductions have a fixed order."""
    where = pairs.locate(problem)
    operands = Operands.of(dout, dlse, q, k, v, out, lse, problem, where)
    differentiated = TileGradients(operands.q, operands.k, operands.v, operands.bias, operands.slopes)
    named = zip(Gradients._fields, differentiated, strict=False)
    total = TileGradients(
        *(torch.zeros_like(x, dtype=problem.accumulate_dtype) if x is not None and name in problem.gradients else None for name, x in named)
    )
    for tile in tiles(problem, where):
        accumulate(total.cut(tile), tile_gradients(operands.cut(tile), problem, where, tile, total))
    dq, dk, dv = (None if x is None else _undense(x, problem).to(problem.dtype) for x in total[:3])
    sinks = problem.sinks if "sinks" in problem.gradients else None
    return Gradients(
        q=dq,
        k=dk,
        v=dv,
        bias=None if problem.bias is None or total.bias is None else total.bias.reshape(problem.bias.shape).to(problem.bias.dtype),
        alibi_slopes=_sum_slopes(total.slopes, problem, where),
        sinks=None if sinks is None else sink_gradient(sinks, operands.lse, operands.delta),
    )


class TileGradients(NamedTuple):
    """Gradients, or weights for them, in the layout of the operands; or a tile of these."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None

    def cut(self, tile: Tile) -> TileGradients:
        q, k, v, bias, slopes = self
        return TileGradients(_at(q, tile.rows), _at(k, tile.cols), _at(v, tile.cols), _at(bias, tile), _at(slopes, tile))


class Operands(NamedTuple):
    """What a backward computes from, dense and in the accumulate dtype but for bias; or a tile of it."""

    dout: Tensor
    delta: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    bias: Tensor | None
    slopes: Tensor | None

    @classmethod
    def of(
        cls, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem, where: Geometry
    ) -> Operands:
        dtype = problem.accumulate_dtype
        q, k, v, dout, out = (pairs.dense(tensor, problem).to(dtype) for tensor in (q, k, v, dout, out))
        if problem.packed:
            lse, dlse = lse[None], None if dlse is None else dlse[None]
        live = (lse != NEG_INF)[..., None]
        dout, q = torch.where(live, dout, 0.0), torch.where(live, q, 0.0)  # of a row that sees nothing not even a nan counts
        delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse
        bias = None if problem.bias is None else as_4d(problem.bias)
        slopes = None if problem.alibi_slopes is None else pairs.slopes_by_row(problem.alibi_slopes.to(dtype), problem, where)
        return cls(dout, delta, q, k, v, lse, bias, slopes)

    def cut(self, tile: Tile) -> Operands:
        rows, cols = tile
        return Operands(
            dout=self.dout[:, :, rows],
            delta=self.delta[:, :, rows],
            q=self.q[:, :, rows],
            k=self.k[:, :, cols],
            v=self.v[:, :, cols],
            lse=self.lse[:, :, rows],
            bias=_at(self.bias, tile),
            slopes=_at(self.slopes, tile),
        )


def _at(tensor: Tensor | None, place: Tile | slice) -> Tensor | None:
    """A view of some rows or columns (of dimension 2), or of a tile of pairs."""
    if tensor is None:
        return None
    return tensor[:, :, place] if isinstance(place, slice) else pairs.part(tensor, place)


def accumulate(totals: Sequence[Tensor | None], shares: Sequence[Tensor | None]) -> None:
    for total, share in zip(totals, shares, strict=True):
        if total is not None and share is not None:
            total += share


def tile_gradients(operands: Operands, problem: Problem, where: Geometry, tile: Tile, wanted: TileGradients) -> TileGradients:
    """What one tile adds to those gradients that are wanted; differentiable, for the second derivative."""
    dout, delta, q, k, v, lse, bias, slopes = operands
    visible = pairs.visible(problem, where, tile)
    if visible is not None:
        k, v = (pairs.finite_rows(tensor, problem.group)[0] for tensor in (k, v))
    distance = pairs.distance(problem, where, tile)
    capped = pairs.cap(pairs.query_key(q, k) * problem.scale, problem.softcap)
    s = _hide(pairs.shift(capped, distance, slopes, None if bias is None else bias.to(q.dtype)), visible, NEG_INF)
    p = _hide(torch.exp(s - _finite_pivot(lse)[..., None]), visible, 0.0)
    factor = pairs.dropout_factor(problem, where, tile)
    dp = pairs.query_key(dout, v)
    ds = _hide(p * ((dp if factor is None else dp * factor) - delta[..., None]), visible, 0.0)
    dscores = ds if problem.softcap is None else ds * (1 - (capped / problem.softcap) ** 2)
    dropped = p if factor is None else p * factor
    return TileGradients(
        q=None if wanted.q is None else pairs.weights_value(dscores, k) * problem.scale,
        k=None if wanted.k is None else pairs.sum_over_queries(dscores, q, problem.kv_heads) * problem.scale,
        v=None if wanted.v is None else pairs.sum_over_queries(dropped, dout, problem.kv_heads),
        bias=None if wanted.bias is None or bias is None else ds.sum_to_size(bias.shape),
        slopes=None if wanted.slopes is None or slopes is None or distance is None else (-ds * distance).sum_to_size(slopes.shape),
    )


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink's probability times (0 - delta), summed over its head: it has no value row."""
    p = torch.where(lse == NEG_INF, 0.0, torch.exp(sinks.to(lse.dtype)[None, :, None] - _finite_pivot(lse)))
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def _sum_slopes(by_row: Tensor | None, problem: Problem, where: Geometry) -> Tensor | None:
    """Undo slopes_by_row: (heads,) or (batch, heads) sums of what broadcast from them."""
    slopes = problem.alibi_slopes
    if by_row is None or slopes is None:
        return None
    if slopes.dim() == 2 and where.member_of_row is not None:
        members = torch.arange(problem.batch, device=problem.device)[:, None] == where.member_of_row.flatten()
        by_row = members.to(by_row.dtype) @ by_row[0, :, :, 0].t()
    return by_row.reshape(slopes.shape).to(slopes.dtype)


def _hide(scores: Tensor, visible: Tensor | None, value: float) -> Tensor:
    return scores if visible is None else scores.masked_fill(~visible, value)


def tiles(problem: Problem, where: Geometry) -> Iterator[Tile]:
    for rows in _blocks(problem.seqlen_q):
        for cols in _key_blocks(problem, where, rows):
            yield Tile(rows, cols)


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, max(length, 1), BLOCK):
        yield slice(start, min(start + BLOCK, length))


def _key_blocks(problem: Problem, where: Geometry, rows: slice) -> Iterator[slice]:
    """The key blocks that some row may see, as far as the host knows: aligned to BLOCK, so that a row meets the same ones in any chunk."""
    first, last = 0, problem.seqlen_k
    offset = pairs.static_offset(problem)
    if offset is not None and problem.window_left is not None:
        first = max(first, rows.start + offset - problem.window_left)
    if offset is not None and problem.window_right is not None:
        last = min(last, rows.stop + offset + problem.window_right)
    if problem.packed and problem.device.type == "cpu" and rows.stop > rows.start:  # where reading cu_seqlens waits for nobody
        first, last = _member_keys(problem, where, rows)
    for start in range(first // BLOCK * BLOCK, last, BLOCK):
        yield slice(start, min(start + BLOCK, problem.seqlen_k))


def _member_keys(problem: Problem, where: Geometry, rows: slice) -> tuple[int, int]:
    """The packed keys of the members that rows belong to; whatever cu_seqlens holds, inside [0, seqlen_k]."""
    if problem.cu_seqlens_k is None or where.member_of_row is None or problem.batch == 0:
        return 0, 0
    members = where.member_of_row[0, 0, rows, 0]
    lowest, highest = (min(int(member), problem.batch - 1) for member in (members.min(), members.max()))
    first, last = (int(problem.cu_seqlens_k[member]) for member in (lowest, highest + 1))
    return max(0, min(first, problem.seqlen_k)), max(0, min(last, problem.seqlen_k))


def as_4d(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor[None, None]


def _undense(tensor: Tensor, problem: Problem) -> Tensor:
    return tensor[0].transpose(0, 1) if problem.packed else tensor
