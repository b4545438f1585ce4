"""Joining attention over parts of the keys into attention over all of them: split keys, ring steps, a shared prefix.

lse = log(sum_n exp(lse_n) + exp(sink));   out = sum_n exp(lse_n - lse) out_n
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import AttentionOutput

NEG_INF = float("-inf")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], *, sinks: Tensor | None = None) -> AttentionOutput:
    """One attention from parts that saw disjoint sets of keys; differentiable, in any order and grouping.

    Args:
        outs: each (..., seqlen_q, head_dim_v), all of one shape and dtype.
        lses: each (..., seqlen_q), natural logarithm, computed without sinks.
        sinks: (heads,) for outs of (batch, heads, seqlen_q, head_dim_v): added once, here.

    Returns:
        out in the dtype of outs, lse; a row that no part saw a key of has out 0 and lse -inf.

    Raises:
        ValueError: no parts, or shapes that do not match.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts, lses has {len(lses)}: expected the same number, at least 1")
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or tuple(lse.shape) != tuple(out.shape[:-1]):
            raise ValueError(
                f"part {index} has out {tuple(out.shape)} and lse {tuple(lse.shape)}, "
                f"expected {tuple(outs[0].shape)} and {tuple(outs[0].shape[:-1])}"
            )
    logits = torch.stack(tuple(lses))
    if sinks is not None:
        if outs[0].dim() != 4 or tuple(sinks.shape) != (outs[0].shape[1],):
            raise ValueError(f"sinks has shape {tuple(sinks.shape)}, outs {tuple(outs[0].shape)}: expected (heads,) with 4-D outs")
        logits = torch.cat((logits, sinks.to(logits.dtype)[None, None, :, None].expand(1, *logits.shape[1:])))
    empty = (logits == NEG_INF).all(0)
    # A row of -inf has no finite logsumexp, and nan for its derivative: it is given zeros and its result replaced.
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=0)
    shares = torch.exp(logits.masked_fill(empty, NEG_INF) - lse)[: len(outs)]
    # A part that saw nothing may hold anything in out: 0 * nan would spoil the others.
    parts = torch.where(shares[..., None] == 0, 0.0, torch.stack(tuple(outs)).to(logits.dtype))
    out = (shares[..., None] * parts).sum(0).to(outs[0].dtype)
    return AttentionOutput(out, lse.masked_fill(empty, NEG_INF))
