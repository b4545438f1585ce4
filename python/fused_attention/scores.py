"""Scores and visibility of any rectangle of (query, key) pairs, in plain PyTorch on any device.

    scores = softcap(scale * q k^T) - slope * |i + offset - j| + bias,     softcap(x) = c * tanh(x / c)

A packed problem becomes a dense one of batch 1, in which queries see only keys of their own member.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import dropout
from .problem import FAR, Problem

NEG_INF = float("-inf")


class Geometry(NamedTuple):
    """Where queries and keys stand; every tensor broadcasts against (batch, heads, seqlen_q, seqlen_k)."""

    row: Tensor  # i, in its own sequence
    col: Tensor  # j
    aligned: Tensor  # i + offset: the key a query stands at
    stream: Tensor  # batch * heads + head
    key_visible: Tensor | None  # start <= j < end
    member_of_row: Tensor | None  # packed: the sequence a query, a key belongs to
    member_of_col: Tensor | None


class Tile(NamedTuple):
    """A rectangle of pairs."""

    rows: slice
    cols: slice


def dense(tensor: Tensor, problem: Problem) -> Tensor:
    """A (total, heads, head_dim) tensor of a packed problem as (1, heads, total, head_dim); others as they are."""
    return tensor.transpose(0, 1).unsqueeze(0) if problem.packed else tensor


def locate(problem: Problem) -> Geometry:
    """The geometry of a problem; nothing is read back from the device."""
    return _locate_packed(problem) if problem.packed else _locate_dense(problem)


def visible(problem: Problem, where: Geometry, tile: Tile) -> Tensor | None:
    """True where a pair of the tile is visible; None if all of them are."""
    aligned, col = part(where.aligned, tile), part(where.col, tile)
    conditions = []
    if problem.window_left is not None:
        conditions.append(col >= aligned - problem.window_left)
    if problem.window_right is not None:
        conditions.append(col <= aligned + problem.window_right)
    if where.key_visible is not None:
        conditions.append(part(where.key_visible, tile))
    if where.member_of_row is not None and where.member_of_col is not None:
        conditions.append(part(where.member_of_row, tile) == part(where.member_of_col, tile))
    if problem.mask is not None:
        conditions.append(part(problem.mask, tile))
    if problem.bias is not None:
        conditions.append(part(problem.bias, tile) != NEG_INF)
    if not conditions:
        return None
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result


def cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def shift(scores: Tensor, distance: Tensor | None, slopes: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scores plus ALiBi plus bias, each broadcast; None where there is none."""
    if slopes is not None and distance is not None:
        scores = scores - slopes * distance
    return scores if bias is None else scores + bias


def distance(problem: Problem, where: Geometry, tile: Tile) -> Tensor | None:
    """|i + offset - j|, which ALiBi scales; None without slopes. Source: Press, Smith, Lewis, "Train short, test long", ICLR 2022."""
    if problem.alibi_slopes is None:
        return None
    return (part(where.aligned, tile) - part(where.col, tile)).abs().to(problem.accumulate_dtype)


def slopes_by_row(slopes: Tensor, problem: Problem, where: Geometry) -> Tensor:
    """alibi_slopes (heads,) or (batch, heads), broadcastable to (batch, heads, seqlen_q, seqlen_k)."""
    if slopes.dim() == 1:
        return slopes[None, :, None, None]
    if where.member_of_row is None:
        return slopes[:, :, None, None]
    members = pad(slopes, (0, 0, 0, 1))  # rows of no member
    return members[where.member_of_row.flatten()].t()[None, :, :, None]


def dropout_factor(problem: Problem, where: Geometry, tile: Tile) -> Tensor | None:
    """What dropout multiplies the probabilities of a tile with: 0 or 1 / (1 - p); None without dropout."""
    if problem.dropout_p == 0 or problem.dropout_seed is None:
        return None
    stream, row, col = (part(index, tile) for index in (where.stream, where.row, where.col))
    kept = dropout.keep(problem.dropout_seed, stream, row, col, problem.dropout_p, None if problem.packed else tile.cols.start or 0)
    return kept.to(problem.accumulate_dtype) * (1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0)


def part(tensor: Tensor, tile: Tile) -> Tensor:
    """The tile of a tensor that broadcasts against (batch, heads, seqlen_q, seqlen_k)."""
    if tensor.dim() == 2:
        tensor = tensor[None, None]
    if tensor.shape[2] != 1:
        tensor = tensor[:, :, tile.rows]
    return tensor if tensor.shape[3] == 1 else tensor[..., tile.cols]


def finite_rows(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Keys or values with zeros for rows that are not finite, and which were not: (batch, heads, 1, cols).

    0 * nan is nan: where pairs are hidden, such a row must not enter a product, not even with weight 0.
    """
    broken = ~torch.isfinite(tensor).all(-1)
    return tensor.masked_fill(broken[..., None], 0.0), broken.repeat_interleave(group, dim=1)[:, :, None, :]


def query_key(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: (batch, heads, rows, d) x (batch, kv_heads, cols, d) -> (batch, heads, rows, cols); a group's queries share one product."""
    return ungroup(group(q, k.shape[1]) @ k.mT, q)


def weights_value(weights: Tensor, v: Tensor) -> Tensor:
    """weights v: (batch, heads, rows, cols) x (batch, kv_heads, cols, d) -> (batch, heads, rows, d)."""
    return ungroup(group(weights, v.shape[1]) @ v, weights)


def sum_over_queries(weights: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """weights^T rows, summed over a group: (batch, heads, rows, cols) x (batch, heads, rows, d) -> (batch, kv_heads, cols, d)."""
    return group(weights, kv_heads).mT @ group(rows, kv_heads)


def group(tensor: Tensor, kv_heads: int) -> Tensor:
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def ungroup(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.reshape(*like.shape[:3], tensor.shape[-1])


def _locate_dense(problem: Problem) -> Geometry:
    device = problem.device
    row = torch.arange(problem.seqlen_q, device=device)[None, None, :, None]
    col = torch.arange(problem.seqlen_k, device=device)[None, None, None, :]
    heads = torch.arange(problem.heads, device=device)[None, :, None, None]
    members = torch.arange(problem.batch, device=device)[:, None, None, None]
    offset = static_offset(problem)
    aligned, key_visible = row + (offset or 0), None
    if offset is None or problem.kv_lengths is not None:
        start, end = _key_interval(problem, torch.full((problem.batch,), problem.seqlen_k, device=device))
        aligned = row + _offset(problem, end - problem.seqlen_q)[:, None, None, None]
        key_visible = (col >= start[:, None, None, None]) & (col < end[:, None, None, None])
    return Geometry(row, col, aligned, members * problem.heads + heads, key_visible, member_of_row=None, member_of_col=None)


def _locate_packed(problem: Problem) -> Geometry:
    cu_q, cu_k = (cu.to(torch.int64) for cu in (problem.cu_seqlens_q, problem.cu_seqlens_k) if cu is not None)
    # One member more than there are stands for the rows that belong to none.
    length_q, length_k = (pad((cu[1:] - cu[:-1]).clamp(min=0), (0, 1)) for cu in (cu_q, cu_k))
    member_q, row = _place(problem.seqlen_q, cu_q)
    member_k, col = _place(problem.seqlen_k, cu_k)
    start, end = _key_interval(problem, length_k)
    aligned = row + _offset(problem, end - length_q)[member_q]
    heads = torch.arange(problem.heads, device=problem.device)[None, :, None, None]
    return Geometry(
        row=row[None, None, :, None],
        col=col[None, None, None, :],
        aligned=aligned[None, None, :, None],
        stream=member_q[None, None, :, None] * problem.heads + heads,
        key_visible=((col >= start[member_k]) & (col < end[member_k]))[None, None, None, :],
        member_of_row=member_q[None, None, :, None],
        member_of_col=member_k[None, None, None, :],
    )


def static_offset(problem: Problem) -> int | None:
    """The offset where the host knows it for the whole batch, else None."""
    if isinstance(problem.offset, Tensor) or problem.packed:
        return None
    if problem.offset is not None:
        return problem.offset
    return problem.seqlen_k - problem.seqlen_q if problem.kv_lengths is None else None


def _place(total: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The member of each packed row, and its position in it; rows of no member get the number of members."""
    rows = torch.arange(total, device=cu_seqlens.device)
    member = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    member = torch.where(rows < cu_seqlens[0], cu_seqlens.shape[0] - 1, member)
    return member, rows - cu_seqlens[member]


def _key_interval(problem: Problem, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[start, end) of every member's visible keys, inside [0, length) whatever kv_lengths holds."""
    if problem.kv_lengths is None:
        return torch.zeros_like(lengths), lengths
    given = problem.kv_lengths.to(torch.int64)
    if given.dim() == 1:
        given = pad(given[:, None], (1, 0))
    given = pad(given, (0, 0, 0, lengths.shape[0] - given.shape[0]))
    start, end = torch.minimum(given.clamp(min=0), lengths[:, None]).unbind(1)
    return start, end


def _offset(problem: Problem, default: Tensor) -> Tensor:
    if problem.offset is None:
        return default
    if not isinstance(problem.offset, Tensor):
        return torch.full_like(default, problem.offset)
    given = problem.offset.to(torch.int64).clamp(-FAR, FAR)
    return pad(given, (0, default.shape[0] - given.shape[0]))
