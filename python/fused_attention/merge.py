"""Joining attention over parts of the keys into attention over all of them: split keys, ring steps, a shared prefix.

lse = log(sum_n exp(lse_n) + exp(sink));   out = sum_n exp(lse_n - lse) out_n
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import AttentionOutput

NEG_INF = float("-inf")
PACKED, BATCHED = 3, 4  # dimensions of out


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], *, sinks: Tensor | None = None) -> AttentionOutput:
    """One attention from parts that saw disjoint sets of keys; differentiable, in any order and grouping.

    The sum is the parallel form of online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), extended
    to the product with v (Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021).

    Args:
        outs: a tensor a part, as `attention_with_lse` gives it, (batch, heads, seqlen_q, head_dim_v), or packed as
            `attention_varlen_with_lse` does, (total, heads, head_dim_v); all of one shape and one floating dtype.
        lses: a tensor a part, (batch, heads, seqlen_q), packed (heads, total); natural logarithms of one floating dtype, without sinks.
        sinks: (heads,), floating: one logit a head that has no value, added once, here.

    Returns:
        out in the dtype of outs and lse in that of lses; a row that no part saw a key of has out 0, and lse -inf or its head's sink.

    Raises:
        TypeError: outs or lses is no list or tuple of tensors, sinks no tensor, or dtypes are mixed or not floating.
        ValueError: no parts, shapes that do not match, or more than one device.
    """
    _check_types(outs, lses, sinks)
    _check_shapes(outs, lses, sinks)
    logits = torch.stack(tuple(lses))
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(logits.dtype)[:, None].expand(1, *logits.shape[1:])))
    empty = (logits == NEG_INF).all(0)
    # A row of -inf has no finite logsumexp, and nan for its derivative: it is given zeros and its result replaced.
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=0)
    shares = torch.exp(logits.masked_fill(empty, NEG_INF) - lse)[: len(outs)]
    weights = (shares.transpose(1, 2) if outs[0].dim() == PACKED else shares)[..., None]
    # A part that saw nothing may hold anything in out: 0 * nan would spoil the others.
    parts = torch.where(weights == 0, 0.0, torch.stack(tuple(outs)))
    return AttentionOutput((weights * parts).sum(0).to(outs[0].dtype), lse.masked_fill(empty, NEG_INF))


def _check_types(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} is a {type(parts).__name__}, expected a list or tuple of tensors, one for each part")
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}[{index}] is a {type(part).__name__}, expected a torch.Tensor")
        dtypes = [part.dtype for part in parts]
        if any(dtype != dtypes[0] or not dtype.is_floating_point for dtype in dtypes):
            raise TypeError(f"{name} has {', '.join(map(str, dtypes))}, expected one floating dtype: convert all parts to it")
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        got = sinks.dtype if isinstance(sinks, Tensor) else f"a {type(sinks).__name__}"
        raise TypeError(f"sinks is {got}, expected a floating torch.Tensor (heads,)")


def _check_shapes(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts, lses has {len(lses)}: expected the same number, at least 1")
    shape, device = tuple(outs[0].shape), outs[0].device
    if len(shape) not in (PACKED, BATCHED):
        raise ValueError(f"outs[0] has shape {shape}, expected (batch, heads, seqlen_q, head_dim_v), or packed (total, heads, head_dim_v)")
    lse_shape, axes = (shape[1::-1], "(heads, total)") if len(shape) == PACKED else (shape[:-1], "(batch, heads, seqlen_q)")
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if tuple(out.shape) != shape or tuple(lse.shape) != lse_shape:
            raise ValueError(
                f"part {index} has out {tuple(out.shape)} and lse {tuple(lse.shape)}, expected {shape} and {axes} = {lse_shape}"
            )
        if not (out.device == lse.device == device):
            raise ValueError(
                f"part {index} has out on {out.device} and lse on {lse.device}, outs[0] is on {device}: move all to one device"
            )
    if sinks is None:
        return
    if tuple(sinks.shape) != (shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected (heads,) = ({shape[1]},)")
    if sinks.device != device:
        raise ValueError(f"sinks is on {sinks.device}, outs on {device}: move all to one device")
