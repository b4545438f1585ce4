"""Which calls of a MultiHeadAttention `attention` takes, which torch has to judge, and what a module that torch does not know refuses."""

from typing import NoReturn

import torch
from torch import Tensor, nn


def can_attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    served: bool,
) -> bool:
    """Whether torch accepts the call and `attention` can take it: the one check of the inputs.

    served says that the module calls `attention` with autocast disabled where inputs are float64, which torch has to judge otherwise.
    """
    dims = query.dim()
    if query.is_nested or key.is_nested or value.is_nested or dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        return False
    if (module.in_proj_weight is None) == module._qkv_same_embed_dim or (module.bias_k is None) != (module.bias_v is None):
        return False
    features = (query.shape[-1], key.shape[-1], value.shape[-1])
    if features != (module.embed_dim, module.kdim, module.vdim) or (not served and module.embed_dim % module.num_heads):
        return False
    if key.shape[:-1] != value.shape[:-1]:
        return False
    if module.training and not 0.0 <= module.dropout <= 1.0:
        return False
    batch_dim, seq_dim = (0, 1) if module.batch_first else (1, 0)
    if dims == 2:
        batch, seqlen_q, seqlen_k = 1, query.shape[0], key.shape[0]
    elif query.shape[batch_dim] == key.shape[batch_dim]:
        batch, seqlen_q, seqlen_k = query.shape[batch_dim], query.shape[seq_dim], key.shape[seq_dim]
    else:
        return False
    padding_shape = (batch, seqlen_k) if dims == 3 else (seqlen_k,)
    if key_padding_mask is not None and key_padding_mask.shape != padding_shape:
        return False
    if attn_mask is not None and attn_mask.shape not in ((seqlen_q, seqlen_k), (batch * module.num_heads, seqlen_q, seqlen_k)):
        return False
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    dtype = query.dtype
    alike = dtype == key.dtype == value.dtype == weight.dtype == (weight if module.in_proj_bias is None else module.in_proj_bias).dtype
    if not (dtype.is_floating_point and alike) and not autocasts(query):
        return False
    if dtype is torch.float64 and autocasts(query) and not (alike and served):  # autocast would leave linear layers, not attention
        return False
    return all(mask is None or _mask_fits(mask, query, need_weights) for mask in (attn_mask, key_padding_mask))


def takes_nested(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether torch documents the nested call as one it takes: self-attention at inference, without masks."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or any(parameter.requires_grad for parameter in module.parameters()))
    alone = query is key and key is value and key_padding_mask is None and attn_mask is None
    return alone and query.layout is torch.strided and query.dim() == 3 and module.batch_first and not module.training and not needs_grad


def refuse_call(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> NoReturn:
    """The error of a call that `can_attend` turns down, to a module with extras: torch has nothing that computes it."""
    inputs = {"query": query, "key": key, "value": value}
    masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
    for name, x in inputs.items():
        if x.is_nested:
            raise NotImplementedError(f"{name} is a nested tensor, and this module has extras: pad it, and give key_padding_mask")
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {query.dim() if x is not query else '2 or 3'} dimensions")
    for (name, x), width in zip(inputs.items(), (module.embed_dim, module.kdim, module.vdim), strict=True):
        if x.shape[-1] != width:
            raise ValueError(f"{name} has {x.shape[-1]} features, expected {width}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}: all but the features must agree")
    batch_dim, seq_dim = (0, 1) if module.batch_first else (1, 0)
    batch = query.shape[batch_dim] if query.dim() == 3 else 1
    if query.dim() == 3 and key.shape[batch_dim] != batch:
        raise ValueError(f"query has batch {batch}, key {key.shape[batch_dim]} (batch_first={module.batch_first}): they must be equal")
    seqlen_q, seqlen_k = (x.shape[seq_dim if query.dim() == 3 else 0] for x in (query, key))
    shapes = {
        "key_padding_mask": ((batch, seqlen_k),) if query.dim() == 3 else ((seqlen_k,),),
        "attn_mask": ((seqlen_q, seqlen_k), (batch * module.num_heads, seqlen_q, seqlen_k)),
    }
    for name, mask in masks.items():
        if mask is not None and tuple(mask.shape) not in shapes[name]:
            expected = " or ".join(map(str, shapes[name]))
            raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
    types = ", ".join(
        f"{name} is {x.dtype} on {x.device}"
        for name, x in (*inputs.items(), *masks.items(), ("out_proj.weight", module.out_proj.weight))
        if x is not None
    )
    raise TypeError(
        f"{types}: expected inputs of the weights' floating dtype, masks of bool or that dtype, all on one device, "
        f"and a dropout from 0 to 1, got {module.dropout}"
    )


def autocasts(x: Tensor) -> bool:
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _mask_fits(mask: Tensor, query: Tensor, need_weights: bool) -> bool:
    if mask.device != query.device:
        return False
    if mask.dtype in (torch.bool, query.dtype):
        return True
    # torch adds fp32 masks to half precision scores only where its fused kernels do the addition.
    fused = mask.dtype is torch.float32 and query.dtype in (torch.float16, torch.bfloat16) and not need_weights
    return mask.is_floating_point() and (fused or (autocasts(query) and query.dtype is not torch.float64))
