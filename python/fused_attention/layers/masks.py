"""The two masks of torch's modules, as the mask and the bias of `attention`.

    mask = not attn_mask and not key_padding_mask      of the bool ones: there True hides, here True may attend
    bias = attn_mask + key_padding_mask                of the floating ones, added to the scores

so that a mask stays a byte an element, and heads that share an attn_mask share one copy of it. So do batch members, unless a
key_padding_mask of the same kind joins it: the two together are (batch, 1, seqlen_q, seqlen_k).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScoreMasks(NamedTuple):
    """mask and bias, each None, (seqlen_q, seqlen_k), or (batch, heads, seqlen_q, seqlen_k) with 1 where nothing depends on a dimension."""

    mask: Tensor | None
    bias: Tensor | None


def score_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, columns: int) -> ScoreMasks:
    """What hides and what is added, with `columns` more keys in front that every query sees.

    attn_mask: (seqlen_q, seqlen_k), or (batch * heads, seqlen_q, seqlen_k) with the heads of a batch member together.
    key_padding_mask: (batch, seqlen_k).
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(attn_mask.shape[0] // heads, heads, *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    mask = bias = None
    for given in (attn_mask, key_padding_mask):
        if given is None:
            continue
        if given.dtype is torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    if columns:
        mask = None if mask is None else F.pad(mask, (columns, 0), value=True)
        bias = None if bias is None else F.pad(bias, (columns, 0))
    return ScoreMasks(mask, bias)


def add_causal_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor, seq_dim: int) -> Tensor:
    """attn_mask that also hides later keys, top left aligned, for torch's own functions; TorchScript compiles it."""
    later = torch.ones(query.size(seq_dim), key.size(seq_dim), dtype=torch.bool, device=query.device).triu(1)
    if attn_mask is not None:
        return attn_mask | later if attn_mask.dtype == torch.bool else attn_mask.masked_fill(later, float("-inf"))
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        # torch deprecates masks of two dtypes, with a warning that this mask must not provoke.
        return torch.zeros_like(later, dtype=key_padding_mask.dtype).masked_fill(later, float("-inf"))
    return later


def pad_nested(x: Tensor) -> tuple[Tensor, Tensor]:
    """A nested (batch, seqlen, features) as a padded tensor and the bool padding mask (batch, seqlen) of it; TorchScript compiles it."""
    padding = torch.ones_like(x).to_padded_tensor(0.0)[:, :, 0] == 0
    return x.to_padded_tensor(0.0), padding


def readable_hint(is_causal: bool) -> bool:
    """is_causal, or False where tracing cannot tell: from comparing the mask with a causal one, which then hides as much by itself."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(is_causal)
