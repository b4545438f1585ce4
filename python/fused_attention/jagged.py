"""Sequences of unlike lengths packed one after the other: jagged nested tensors taken apart, and the options that they exclude.

(batch, heads, jagged, head_dim)  ->  rows (total, heads, head_dim), cu_seqlens (batch + 1,)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NO_RECTANGLE = (
    "{name} does not apply to packed sequences, whose pairs fill no (seqlen_q, seqlen_k) rectangle: "
    "use causal, window, offset, kv_lengths or alibi_slopes"
)


def reject(arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name in ("mask", "bias"):
            raise TypeError(NO_RECTANGLE.format(name=name))
        raise TypeError(f"unexpected keyword argument {name!r}")


def any_nested(*operands: Tensor) -> bool:
    for operand in operands:  # noqa: SIM110 (a loop takes half the time of any)
        if isinstance(operand, Tensor) and operand.is_nested:
            return True
    return False


def unpack(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """q, k and v as packed rows, with cu_seqlens_q and cu_seqlens_k; TypeError or ValueError where they are not alike, or have holes."""
    reject({name: value for name, value in options.items() if name in ("mask", "bias")})
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if not (isinstance(operand, Tensor) and operand.is_nested and operand.layout is torch.jagged and operand.dim() == 4):
            raise TypeError(f"{name} is not a jagged nested tensor (batch, heads, jagged, head_dim): pass all three as such, or none")
    operands: list[Any] = [q, k, v]  # _ragged_idx, offsets(), lengths() and values() are a jagged tensor's own
    for name, jagged in zip("qkv", operands, strict=True):
        if jagged._ragged_idx != 2:
            raise ValueError(
                f"{name} is ragged in dimension {jagged._ragged_idx}, expected 2: (batch, heads, jagged, head_dim), use .transpose(1, 2)"
            )
        if jagged.lengths() is not None:
            raise ValueError(f"{name} has holes between its members: make it contiguous, or use attention_varlen with kv_lengths")
    if k.shape[2] != v.shape[2]:
        raise ValueError("k and v are jagged in unlike ways: build both from the same offsets, as nested_tensor_from_jagged does")
    rows_q, rows_k, rows_v = (jagged.transpose(1, 2).values() for jagged in operands)
    return (rows_q, rows_k, rows_v), {"cu_seqlens_q": operands[0].offsets(), "cu_seqlens_k": operands[1].offsets()}
