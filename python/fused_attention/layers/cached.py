"""Attention of a module over keys and values that a cache holds: of the rows before, or of a memory that was projected once.

decode:    cache += (x W_K, x W_V),  out = attention(x W_Q, cache) W_O    each row sees itself and those before
remember:  cache += (memory W_K, memory W_V)
look_up:                             out = attention(x W_Q, cache) W_O    each row sees all that the cache holds
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fused_attention.cache import KVCache
from fused_attention.decoding import attention_with_cache
from fused_attention.layer_ops import linear
from fused_attention.paging import PagedKVCache

from .acceptance import autocasts
from .extras import attention_options
from .fused import linear_of
from .heads import head_dim_of, join_heads, project, split_heads

AnyCache: TypeAlias = KVCache | PagedKVCache


def new_cache(module: Any, batch: int, capacity: int) -> KVCache:
    """An empty cache for `capacity` rows of each of `batch` members, of the module's heads and device, and of the dtype it projects to."""
    _refuse_columns(module)
    kv_heads, weight = _extra(module, "num_kv_heads") or module.num_heads, module.out_proj.weight
    cast = autocasts(weight) and weight.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(weight.device.type) if cast else weight.dtype
    return KVCache(batch, capacity, kv_heads, head_dim_of(module), dtype=dtype, device=weight.device)


def decode(module: Any, x: Tensor, cache: AnyCache) -> Tensor:
    """The output of rows x that follow those in the cache, which keeps the keys and values of these too."""
    _check(module, x, "x", module.embed_dim)
    q, k, v = project(module, x, x, x)
    q, k, v = split_heads(module, q, _norm(module, "q_norm")), split_heads(module, k, _norm(module, "k_norm")), split_heads(module, v)
    options = _options(module, q, causal=True) | {"rotary": _extra(module, "rotary")}
    return _out(module, attention_with_cache(q, cache, k=k, v=v, causal=True, **options))


def remember(module: Any, memory: Tensor, cache: AnyCache, lengths: Tensor | None = None) -> None:
    """Gives the cache the keys and values of a memory, of which member b has lengths[b] rows, the others being padding behind them.

    lengths: int (batch,), on the memory's device; for a PagedKVCache on the CPU, where its pages are dealt out.
    """
    _check(module, memory, "memory", module.kdim)
    _refuse_distances(module)
    if module.vdim != module.kdim:
        raise NotImplementedError(f"kdim is {module.kdim}, vdim {module.vdim}: a memory gives keys and values alike, so they must be equal")
    no_queries = memory.new_empty(0, *memory.shape[1:-1], module.embed_dim)
    _, k, v = project(module, no_queries, memory, memory)
    cache.append(split_heads(module, k, _norm(module, "k_norm")), split_heads(module, v), new_lengths=lengths)


def look_up(module: Any, x: Tensor, cache: AnyCache) -> Tensor:
    """The output of rows x that all see all that the cache holds, which stays as it is."""
    _check(module, x, "x", module.embed_dim)
    _refuse_distances(module)
    q_features = module.num_heads * head_dim_of(module)
    weight = module.in_proj_weight[:q_features] if module._qkv_same_embed_dim else module.q_proj_weight
    bias = None if module.in_proj_bias is None else module.in_proj_bias[:q_features]
    q = split_heads(module, linear(x, weight, bias), _norm(module, "q_norm"))
    return _out(module, attention_with_cache(q, cache, **_options(module, q, causal=False)))


def _extra(module: Any, name: str) -> Any:
    return None if module._fused_extras is None else getattr(module._fused_extras, name)


def _norm(module: Any, name: str) -> nn.Module | None:
    return None if _extra(module, "qk_norm") is None else getattr(module, name)


def _options(module: Any, q: Tensor, causal: bool) -> dict[str, Any]:
    return {} if module._fused_extras is None else attention_options(module, module._fused_extras, q, causal)


def _out(module: Any, out: Tensor) -> Tensor:
    return linear_of(module.out_proj, join_heads(module, out, True))


def _check(module: nn.MultiheadAttention, x: Tensor, name: str, features: int) -> None:
    _refuse_columns(module)
    if x.is_nested or x.dim() != 3 or x.shape[-1] != features:
        order = "(batch, rows, features)" if module.batch_first else "(rows, batch, features)"
        got = "a nested tensor" if x.is_nested else f"of shape {tuple(x.shape)}"
        raise ValueError(f"{name} is {got}, expected {order} with {features} features")
    if module.training and module.dropout:
        raise ValueError(f"the module is in training mode with dropout {module.dropout}, and caches are for inference: call eval() first")


def _refuse_distances(module: Any) -> None:
    for name in ("rotary", "window", "alibi"):
        if _extra(module, name):
            raise NotImplementedError(f"a module with {name} cannot look at a cached memory, which its rows have no distance to")


def _refuse_columns(module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise NotImplementedError("a module with add_bias_kv or add_zero_attn cannot decode with a cache: build it with sinks=True instead")
