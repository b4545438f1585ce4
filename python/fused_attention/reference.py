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


def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
    """out and lse, differentiable by PyTorch's own rules."""
    dtype = problem.accumulate_dtype
    q, k, v = (pairs.dense(tensor, problem).to(dtype) for tensor in (q, k, v))
    where = pairs.locate(problem)
    everything = Tile(slice(None), slice(None))
    visible = pairs.visible(problem, where, everything)
    k, v, poison = _contain(k, v, visible, problem)
    scores = masked_scores(q, k, visible, problem, where)
    lse = _log_sum_exp(scores, problem)
    weights = _weights(scores, lse)
    factor = pairs.dropout_factor(problem, where, everything)
    out = pairs.weights_value(weights if factor is None else weights * factor, v)
    if poison is not None:
        out, lse = out + poison[..., None], lse + poison
    out = out.to(problem.dtype)
    return AttentionOutput(out[0].transpose(0, 1), lse[0]) if problem.packed else AttentionOutput(out, lse)


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, problem: Problem, average_heads: bool) -> Tensor:
    """The probabilities themselves, after dropout, from an lse that some backend computed."""
    where = pairs.locate(problem)
    everything = Tile(slice(None), slice(None))
    visible = pairs.visible(problem, where, everything)
    q, k = (tensor.to(problem.accumulate_dtype) for tensor in (q, k))
    k, _, _ = _contain(k, k, visible, problem)
    weights = _weights(masked_scores(q, k, visible, problem, where), lse)
    factor = pairs.dropout_factor(problem, where, everything)
    weights = weights if factor is None else weights * factor
    return weights.mean(1) if average_heads else weights


def masked_scores(q: Tensor, k: Tensor, visible: Tensor | None, problem: Problem, where: Geometry) -> Tensor:
    everything = Tile(slice(None), slice(None))
    slopes = None if problem.alibi_slopes is None else pairs.slopes_by_row(problem.alibi_slopes.to(q.dtype), problem, where)
    scores = pairs.cap(pairs.query_key(q, k) * problem.scale, problem.softcap)
    bias = None if problem.bias is None else problem.bias.to(q.dtype)
    scores = pairs.shift(scores, pairs.distance(problem, where, everything), slopes, bias)
    return scores if visible is None else scores.masked_fill(~visible, NEG_INF)


def _log_sum_exp(scores: Tensor, problem: Problem) -> Tensor:
    """The natural logarithm, with the sink as one more logit; -inf for a row that sees nothing."""
    logits = scores
    if problem.sinks is not None:
        sinks = problem.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, sinks), dim=-1)
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:3], NEG_INF)
    empty = (logits == NEG_INF).all(-1)
    # The derivative of logsumexp is nan on a row of -inf, so such a row is given another and its result replaced.
    return torch.logsumexp(logits.masked_fill(empty[..., None], 0.0), dim=-1).masked_fill(empty, NEG_INF)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # -inf - -inf would be nan: a row that sees nothing has weights exp(-inf - 0) = 0.
    return torch.exp(scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])


def _contain(k: Tensor, v: Tensor, visible: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Finite keys and values, and nan for the rows that see one that was not: 0 * nan must not reach the others."""
    if visible is None:
        return k, v, None
    broken = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))
    sees_broken = (visible & broken.repeat_interleave(problem.group, dim=1)[:, :, None, :]).any(-1)
    poison = torch.where(sees_broken, torch.nan, 0.0).to(k.dtype)
    return k.masked_fill(broken[..., None], 0.0), v.masked_fill(broken[..., None], 0.0), poison
