"""PyTorch's scaled_dot_product_attention, signature and semantics, on our kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from .functional import attention

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: (..., heads, seqlen, head_dim), batch dimensions broadcast.

    is_causal aligns the first query with the first key. attn_mask broadcasts to (..., heads, seqlen_q, seqlen_k): bool, True = may
    attend; or floating, added, and differentiable; or torch.nn.attention.bias.CausalBias. dropout_p applies whenever it is above 0.

    Raises:
        TypeError: query, key, value or attn_mask is no tensor, is_causal or enable_gqa no bool, dropout_p or scale no number.
        RuntimeError: where PyTorch raises one: dtypes or devices that differ, less than 2 dimensions, attn_mask together with
            is_causal, heads that do not divide, shapes that do not match; and for a CausalBias of other lengths than query's and
            key's, which PyTorch ignores wherever it can take the bias for is_causal.
    """
    _check_types(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    options: dict[str, Any] = {"dropout_p": float(dropout_p), "scale": scale}
    try:
        lead, (q, k, v) = _as_4d(query, key, value, enable_gqa)
        if isinstance(attn_mask, CausalBias):
            lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
            options |= {"causal": True, "offset": attn_mask.seq_len_kv - attn_mask.seq_len_q if lower_right else 0}
        elif attn_mask is not None:
            name = "mask" if attn_mask.dtype is torch.bool else "bias"
            options[name] = _mask_as_4d(attn_mask, (*lead, query.shape[-2], key.shape[-2]))
        elif is_causal:
            options |= {"causal": True, "offset": 0}
        out = attention(q, k, v, **options)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    return out.reshape(*lead, *out.shape[-2:])


def _check_types(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "attn_mask"):
            raise TypeError(f"scaled_dot_product_attention: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"scaled_dot_product_attention: {name} is {flag!r}, expected True or False")
    for name, number in (("dropout_p", dropout_p), ("scale", scale)):
        if not isinstance(number, NUMBERS) and (number is not None or name != "scale"):
            raise TypeError(f"scaled_dot_product_attention: {name} is {number!r}, expected a number")


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    if not (query.dtype == key.dtype == value.dtype) and not torch.is_autocast_enabled(query.device.type):
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, "
            f"but got query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be at least 2 dimensional, "
            f"but got query.dim: {query.dim()}, key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise RuntimeError("enable_gqa needs query, key and value with a heads dimension: (..., heads, seqlen, head_dim)")
    if attn_mask is None:
        return
    if is_causal:
        raise RuntimeError("scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    if isinstance(attn_mask, CausalBias):
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.shape[-2], key.shape[-2]):
            raise RuntimeError(
                f"attn_mask is a CausalBias for {attn_mask.seq_len_q} queries and {attn_mask.seq_len_kv} keys, "
                f"but query has {query.shape[-2]} and key {key.shape[-2]}: build the bias for these lengths"
            )
    elif attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, "
            f"but got attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead."
        )


def _as_4d(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], list[Tensor]]:
    """The result's leading dimensions, and the three as (batch, heads, seqlen, head_dim); without GQA heads broadcast like batch."""
    own = 3 if enable_gqa else 2  # trailing dimensions that do not broadcast
    batch = torch.broadcast_shapes(*(tensor.shape[:-own] for tensor in (query, key, value)))
    wide = [tensor.expand(*batch, *tensor.shape[-own:]) for tensor in (query, key, value)]
    lead = tuple(wide[0].shape[:-2])
    return lead, [tensor.reshape(math.prod(tensor.shape[:-3]), *_heads(tensor), *tensor.shape[-2:]) for tensor in wide]


def _heads(tensor: Tensor) -> tuple[int]:
    return (tensor.shape[-3] if tensor.dim() > 2 else 1,)


def _mask_as_4d(mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to (..., heads, seqlen_q, seqlen_k), as 4-D with each size 1 or full, expanded only where it must be."""
    if mask.dim() > len(full):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}")
    mask = mask.reshape(*(1,) * (max(len(full), 4) - mask.dim()), *mask.shape)
    if mask.dim() == 4:
        return mask
    return mask.expand(*full[:-3], *mask.shape[-3:]).flatten(0, -4)
