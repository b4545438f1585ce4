"""The definition of attention, as a formula on whole matrices: what every backend must equal. Memory O(seqlen_q * seqlen_k).

scores = softcap(scale * q k^T) - slope * |i + offset - j| + bias;  hidden pairs -> -inf
lse    = log(sum(exp(scores)) + exp(sink))
out    = dropout(exp(scores - lse)) v
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import scores as pairs
from .problem import AttentionOutput, Problem
from .scores import NEG_INF, Geometry, Tile

EVERYTHING = Tile(slice(None), slice(None))


def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
    """out and lse, differentiable by PyTorch's own rules."""
    q, k, v = (pairs.dense(tensor, problem).to(problem.accumulate_dtype) for tensor in (q, k, v))
    where = pairs.locate(problem)
    visible = pairs.visible(problem, where, EVERYTHING)
    if visible is not None:
        blind = ~visible.any(-1, keepdim=True)
        q = q.masked_fill(blind, 0.0)  # of a row that sees nothing not even a nan counts, in no gradient either
    scores = masked_scores(q, k, visible, problem, where, EVERYTHING)
    weights, lse = _softmax(scores, problem)
    factor = pairs.dropout_factor(problem, where, EVERYTHING)
    out = _weigh(weights if factor is None else weights * factor, v, visible, problem)
    out = (out if visible is None else out.masked_fill(blind, 0.0)).to(problem.dtype)
    return AttentionOutput(out[0].transpose(0, 1), lse[0]) if problem.packed else AttentionOutput(out, lse)


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, problem: Problem, average_heads: bool) -> Tensor:
    """The probabilities themselves, after dropout, from an lse that some backend computed.

    Their mean over heads is made in blocks of rows, which together hold no more than the result does.
    """
    q, k = (tensor.to(problem.accumulate_dtype) for tensor in (q, k))
    where = pairs.locate(problem)
    if not average_heads or torch.compiler.is_compiling():  # a loop over blocks would bind the graph to one length
        weights = _weights_of_rows(q, k, lse, problem, where, EVERYTHING)
        return weights.mean(1) if average_heads else weights
    step = -(-problem.seqlen_q // problem.heads) or 1
    blocks = [Tile(slice(first, first + step), slice(None)) for first in range(0, problem.seqlen_q, step)] or [EVERYTHING]
    return torch.cat([_weights_of_rows(q, k, lse, problem, where, tile).mean(1) for tile in blocks], dim=1)


def _weights_of_rows(q: Tensor, k: Tensor, lse: Tensor, problem: Problem, where: Geometry, tile: Tile) -> Tensor:
    visible = pairs.visible(problem, where, tile)
    weights, own = _softmax(masked_scores(q[:, :, tile.rows], k, visible, problem, where, tile), problem)
    # exp(scores - lse), but rows sum to 1 also where lse is too large for its last digits to matter.
    weights = weights * torch.exp(_finite(own) - _finite(lse[:, :, tile.rows]))[..., None]
    factor = pairs.dropout_factor(problem, where, tile)
    return weights if factor is None else weights * factor


def masked_scores(q: Tensor, k: Tensor, visible: Tensor | None, problem: Problem, where: Geometry, tile: Tile) -> Tensor:
    """Scores in the order softcap, ALiBi, bias; hidden pairs -inf, even of keys that are not finite."""
    slopes = None if problem.alibi_slopes is None else pairs.slopes_by_row(problem.alibi_slopes.to(q.dtype), problem, where)
    slopes = None if slopes is None else pairs.part(slopes, tile)
    bias = None if problem.bias is None else pairs.part(problem.bias, tile).to(q.dtype)
    if visible is not None:
        k, broken = pairs.finite_rows(k, problem.group)
    scores = pairs.cap(pairs.query_key(q, k) * problem.scale, problem.softcap)
    scores = pairs.shift(scores, pairs.distance(problem, where, tile), slopes, bias)
    return scores if visible is None else scores.masked_fill(broken, torch.nan).masked_fill(~visible, NEG_INF)


def _softmax(scores: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Probabilities of the keys, and lse; the sink is one more logit. A row that sees nothing has 0 and -inf."""
    logits = scores
    if problem.sinks is not None:
        sinks = problem.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, sinks), dim=-1)
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:3], NEG_INF)
    # -inf - -inf would be nan: a row that sees nothing is measured from 0.
    pivot = _finite(logits.detach().amax(-1))
    exponentials = torch.exp(logits - pivot[..., None])
    total = exponentials.sum(-1)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = exponentials[..., : scores.shape[-1]] / total[..., None]
    return weights, (pivot + torch.log(total)).masked_fill(empty, NEG_INF)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == NEG_INF, 0.0)


def _weigh(weights: Tensor, v: Tensor, visible: Tensor | None, problem: Problem) -> Tensor:
    """weights v; a value row that is not finite reaches exactly the queries that see it."""
    if visible is None:
        return pairs.weights_value(weights, v)
    v, broken = pairs.finite_rows(v, problem.group)
    sees_broken = (visible & broken).any(-1, keepdim=True)
    return pairs.weights_value(weights, v).masked_fill(sees_broken, torch.nan)
