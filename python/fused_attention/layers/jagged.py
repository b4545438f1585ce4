"""Multi-head attention of jagged nested tensors: batches whose members have lengths of their own, without padding.

    out_b = Concat(head_1, ..., head_h) W_O,    head_i = attention(Q_b W_Q_i, K_b W_K_i, V_b W_V_i)    of each batch member b alone

Projected as packed rows, which are what a jagged tensor holds.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fused_attention.functional import attention_varlen

from .heads import project


def takes_jagged(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
    """Whether all inputs are jagged (batch, seqlen, features) as the module needs them: padding is in them, so there are no masks."""
    if not module.batch_first or any(mask is not None for mask in masks):
        return False
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    for x, features in ((query, module.embed_dim), (key, module.kdim), (value, module.vdim)):
        if not (x.is_nested and x.layout is torch.jagged and x.dim() == 3 and x.shape[-1] == features and x.dtype is weight.dtype):
            return False
        jagged: Any = x  # lengths() is a jagged tensor's own
        if jagged.lengths() is not None:  # holes between the members
            return False
    return query.shape[0] == key.shape[0] and key.shape[1] == value.shape[1]


def attend_jagged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Output, jagged as query, and if asked for the weights, padded with zeros: query i of a member sees its keys up to i if is_causal.

    Weights, and the keys of add_bias_kv and add_zero_attn, need the rectangle: padded meanwhile.
    """
    if need_weights or module.bias_k is not None or module.add_zero_attn:
        return _attend_padded(module, query, key, value, need_weights, average_attn_weights, is_causal)
    q_rows = query.values()
    k_rows = q_rows if key is query else key.values()  # identical inputs stay identical, and share a projection
    v_rows = k_rows if value is key else value.values()
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)) for x in project(module, q_rows, k_rows, v_rows))
    dropout_p = float(module.dropout) if module.training else 0.0
    out = attention_varlen(q, k, v, _offsets(query), _offsets(key), causal=is_causal, offset=0, dropout_p=dropout_p)
    return torch.nested.nested_tensor_from_jagged(module.out_proj(out.flatten(-2)), _offsets(query)), None


def _attend_padded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    (q, real), (k, keys), (v, _) = (_pad(x) for x in (query, key, value))
    out, weights = module._attend(q, k, v, ~keys, need_weights, None, average_attn_weights, is_causal)
    if weights is not None:
        weights = weights.masked_fill(~(real if average_attn_weights else real[:, None])[..., None], 0.0)
    return torch.nested.nested_tensor_from_jagged(out[real], _offsets(query)), weights


def _pad(x: Any) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, features) with zeros behind each member, and (batch, seqlen) True where the rows of x are."""
    lengths = _offsets(x).diff()
    real = torch.arange(int(lengths.max()) if len(lengths) else 0, device=x.device) < lengths[:, None]
    padded = x.values().new_zeros(*real.shape, x.shape[-1])
    padded[real] = x.values()
    return padded, real


def _offsets(x: Any) -> Tensor:
    offsets: Tensor = x.offsets()
    return offsets
