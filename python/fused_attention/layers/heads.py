"""Between a module's inputs and its heads: the projections, and the layout (batch, heads, seqlen, head_dim) and back.

q, k, v = x W_Q, x W_K, x W_V,    each row cut into heads        out = the heads' rows, side by side
"""

from typing import Any

import torch
from torch import Tensor, nn

from fused_attention.layer_ops import linear


def project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in-projections, in as few matrix products as identical inputs allow."""
    bias, q_features = module.in_proj_bias, module.num_heads * head_dim_of(module)
    if not module._qkv_same_embed_dim:
        rows_of = [weight.shape[0] for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
        q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.split(rows_of)
        return (
            linear(query, module.q_proj_weight, q_bias),
            linear(key, module.k_proj_weight, k_bias),
            linear(value, module.v_proj_weight, v_bias),
        )
    weight = module.in_proj_weight
    kv_features = (weight.shape[0] - q_features) // 2
    ends = (0, q_features, q_features + kv_features, weight.shape[0])
    if query is key and key is value:
        q, k, v = linear(query, weight, bias).split([q_features, kv_features, kv_features], -1)
        return q, k, v

    def rows(x: Tensor, start: int, end: int) -> Tensor:
        part = slice(ends[start], ends[end])
        return linear(x, weight[part], None if bias is None else bias[part])

    if key is value:
        k, v = rows(key, 1, 3).chunk(2, -1)
        return rows(query, 0, 1), k, v
    if query is key:
        q, k = rows(query, 0, 2).split([q_features, kv_features], -1)
        return q, k, rows(value, 2, 3)
    return rows(query, 0, 1), rows(key, 1, 2), rows(value, 2, 3)


def split_heads(module: Any, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """A view (batch, heads, seqlen, head_dim) of a projection in the order of the module's inputs, or its norm, of that layout."""
    head_dim = head_dim_of(module)
    x = x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    x = x if norm is None else norm(x)
    if x.dim() == 3:
        return x.transpose(0, 1)[None]
    return x.transpose(1, 2) if module.batch_first else x.permute(1, 2, 0, 3)


def head_dim_of(module: Any) -> int:
    """Read at every call from what users may change, as torch does."""
    own: int | None = None if module._fused_extras is None else module._fused_extras.head_dim
    shared: int = module.embed_dim // module.num_heads
    return shared if own is None else own


def join_heads(module: Any, out: Tensor, batched: bool) -> Tensor:
    """(batch, heads, seqlen, head_dim) in the order of the module's inputs, heads side by side: a view, as out has the strides of q."""
    if not batched:
        return out.squeeze(0).transpose(0, 1).flatten(1)
    return (out.transpose(1, 2) if module.batch_first else out.permute(2, 0, 1, 3)).flatten(2)


def add_columns(module: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """k and v with the keys of add_bias_kv and add_zero_attn in front, and how many those are."""
    if module.bias_k is None and not module.add_zero_attn:
        return k, v, 0
    k_parts, v_parts = [k], [v]
    batch, heads, _, head_dim = k.shape
    if module.add_zero_attn:
        k_parts.insert(0, k.new_zeros(batch, heads, 1, head_dim))
        v_parts.insert(0, v.new_zeros(batch, heads, 1, head_dim))
    if module.bias_k is not None and module.bias_v is not None:
        k_parts.insert(0, module.bias_k.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
        v_parts.insert(0, module.bias_v.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
    return torch.cat(k_parts, 2), torch.cat(v_parts, 2), len(k_parts) - 1
