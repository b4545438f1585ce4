"""The calls whose kernels are compiled ahead of time: shapes of real models, every architecture, every option.

    point = architecture, dtype, head_dim, options        a row of the ledger = point, kernel

For the kernels of the layers, which know no heads, head_dim stands for the width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (64, 96, 128, 192, 256, 512)
COMMON_HEAD_DIMS = (64, 128, 256)
BATCH, HEADS, SEQLEN, TOKENS = 2, 16, 4096, 8192
MEMBERS = 8  # of a packed batch


class Point(NamedTuple):
    architecture: str
    dtype: str
    head_dim: int
    options: str  # a key of CALLS

    def __str__(self) -> str:
        return f"{self.architecture} {self.dtype} {self.head_dim} {self.options}"

    def call(self) -> None:
        CALLS[self.options](getattr(torch, self.dtype), self.head_dim)


def empty(*shape: int, dtype: torch.dtype = torch.float32, learns: bool = False) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=learns)


def attend(dtype: torch.dtype, head_dim: int, **options: Any) -> None:
    """Forward and backward; an option may be a tensor or, where its dtype is q's, a function of that."""
    options = {name: value(dtype) if callable(value) else value for name, value in options.items()}
    shape = (TOKENS, HEADS, head_dim) if "cu_seqlens_q" in options else (BATCH, HEADS, SEQLEN, head_dim)
    run(*(empty(*shape, dtype=dtype, learns=True) for _ in range(3)), options)


def decode(dtype: torch.dtype, head_dim: int, queries: int, kv_heads: int, **options: Any) -> None:
    cache = (BATCH, kv_heads, SEQLEN, head_dim)
    run(empty(BATCH, HEADS, queries, head_dim, dtype=dtype), empty(*cache, dtype=dtype), empty(*cache, dtype=dtype), options)


def decode_by_pair(dtype: torch.dtype, head_dim: int, queries: int) -> None:
    """With a mask and a bias, 16 queries of a key head for each query."""
    pairs = (1, HEADS, queries, SEQLEN)
    decode(dtype, head_dim, queries, 1, mask=empty(*pairs, dtype=torch.bool), bias=empty(*pairs))


def decode_pages(dtype: torch.dtype, head_dim: int, queries: int, kv_heads: int, page_size: int) -> None:
    """As attention_with_cache calls it: each member has a start and a length."""
    from fused_attention.triton_backend import attend_pages
    from fused_attention.validation import check

    table = empty(BATCH, SEQLEN // page_size, dtype=torch.int32)
    q, pages = empty(BATCH, HEADS, queries, head_dim, dtype=dtype), empty(table.numel(), kv_heads, page_size, head_dim, dtype=dtype)
    keys = empty(BATCH, kv_heads, SEQLEN, head_dim, dtype=dtype)  # what the pages of members are to the checks
    problem = check(q, keys, keys, causal=True, kv_lengths=empty(BATCH, 2, dtype=torch.int32))
    attend_pages(q, pages, pages, table, problem)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> None:
    from fused_attention.triton_backend import TritonBackend
    from fused_attention.validation import check

    backend, problem = TritonBackend(), check(q, k, v, **options)
    with torch.no_grad():
        out, lse = backend.forward(q, k, v, problem)
        if problem.gradients:
            backend.backward(torch.empty_like(out), None, q, k, v, out, lse, problem)


def attention(**options: Any) -> Callable[[torch.dtype, int], None]:
    return lambda dtype, head_dim: attend(dtype, head_dim, **options)


def norm(dtype: torch.dtype, width: int, kind: str) -> None:
    from fused_attention.triton_kernels.norm import add_norm, add_norm_backward

    x, residual = (empty(TOKENS, width, dtype=dtype) for _ in range(2))
    weight, bias = empty(width, dtype=dtype), empty(width, dtype=dtype) if kind == "layer" else None
    _, summed, mean, rstd = add_norm(x, residual, weight, bias, 1e-5, kind=kind)
    add_norm_backward(empty(TOKENS, width, dtype=dtype), None, summed, weight, bias, mean, rstd)


def activate(dtype: torch.dtype, width: int, activation: str, gated: bool) -> None:
    from fused_attention.triton_kernels.activation import bias_activation, bias_activation_backward

    x, bias = empty(TOKENS, width, dtype=dtype), empty(width, dtype=dtype)
    out = bias_activation(x, bias, activation=activation, gated=gated)
    bias_activation_backward(torch.empty_like(out), x, bias, activation=activation, gated=gated)


def rotate(dtype: torch.dtype, head_dim: int) -> None:
    from fused_attention.triton_kernels.rotary import rotate

    table = empty(SEQLEN, head_dim // 2)
    rotate(empty(BATCH, HEADS, SEQLEN, head_dim, dtype=dtype), table, table)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (512, 0)},
    "mask": {"mask": empty(BATCH, 1, SEQLEN, SEQLEN, dtype=torch.bool)},
    "key-bias": {"bias": lambda dtype: empty(BATCH, 1, 1, SEQLEN, dtype=dtype, learns=True)},
    "bias": {"bias": lambda dtype: empty(1, HEADS, SEQLEN, SEQLEN, dtype=dtype, learns=True)},
    "softcap": {"softcap": 50.0},
    "alibi": {"causal": True, "alibi_slopes": empty(HEADS, learns=True)},
    "dropout": {"dropout_p": 0.1, "dropout_seed": empty(2, dtype=torch.int64)},
    "sinks": {"causal": True, "sinks": empty(HEADS, learns=True)},
    "kv_lengths": {"kv_lengths": empty(BATCH, dtype=torch.int32)},
}
EVERYTHING: dict[str, Any] = {name: value for options in FEATURES.values() for name, value in options.items()}
EVERYTHING["bias"] = empty(1, HEADS, SEQLEN, SEQLEN, learns=True)  # fp32: the largest number a pair can have
CALLS: dict[str, Callable[[torch.dtype, int], None]] = {
    "plain": attention(),
    "causal": attention(causal=True),
    "decode": lambda dtype, head_dim: decode(dtype, head_dim, queries=1, kv_heads=4),
    "decode-many": lambda dtype, head_dim: decode(dtype, head_dim, queries=4, kv_heads=1),  # 64 rows share a key head
    **{name: attention(**options) for name, options in FEATURES.items()},
    "everything": attention(**EVERYTHING),
    **{f"decode-{16 * queries}-by-pair": functools.partial(decode_by_pair, queries=queries) for queries in (1, 2, 4)},
    "decode-pages": lambda dtype, head_dim: decode_pages(dtype, head_dim, queries=1, kv_heads=4, page_size=256),  # of whole tiles
    "decode-small-pages": lambda dtype, head_dim: decode_pages(dtype, head_dim, queries=1, kv_heads=4, page_size=16),
    "decode-many-pages": lambda dtype, head_dim: decode_pages(dtype, head_dim, queries=4, kv_heads=1, page_size=16),
    "varlen": attention(causal=True, cu_seqlens_q=empty(MEMBERS + 1, dtype=torch.int32)),
    "layer-norm": lambda dtype, width: norm(dtype, width, "layer"),
    "rms-norm": lambda dtype, width: norm(dtype, width, "rms"),
    "gelu": lambda dtype, width: activate(dtype, width, "gelu", False),
    "swiglu": lambda dtype, width: activate(dtype, width, "silu", True),
    "rotary": rotate,
}


def points(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[Point]:
    for architecture in architectures:
        for head_dim in HEAD_DIMS:
            yield Point(architecture, "bfloat16", head_dim, "causal")  # masked and unmasked loops both
        for head_dim in COMMON_HEAD_DIMS:
            yield Point(architecture, "bfloat16", head_dim, "plain")
        for head_dim in (*COMMON_HEAD_DIMS, 512):
            yield Point(architecture, "bfloat16", head_dim, "decode")
            yield Point(architecture, "bfloat16", head_dim, "decode-many")
            yield Point(architecture, "float32", head_dim, "decode-many")
            yield Point(architecture, "float32", head_dim, "plain")
            yield Point(architecture, "bfloat16", head_dim, "decode-pages")
            yield Point(architecture, "bfloat16", head_dim, "decode-small-pages")
            yield Point(architecture, "float32", head_dim, "decode-small-pages")
        for head_dim in COMMON_HEAD_DIMS:
            yield Point(architecture, "bfloat16", head_dim, "decode-many-pages")
        for options in (*FEATURES, "varlen") if architecture == "sm_90" else ("everything", "varlen"):
            yield Point(architecture, "bfloat16", 128, options)
        for width, options in ((1024, "layer-norm"), (8192, "rms-norm"), (4096, "gelu"), (8192, "swiglu"), (128, "rotary")):
            yield Point(architecture, "bfloat16", width, options)


def default_points() -> Iterator[Point]:
    """What every test run compiles."""
    for architecture in ("sm_80", "sm_90"):
        for head_dim in (64, 128):
            for options in ("plain", "causal", "decode"):
                yield Point(architecture, "bfloat16", head_dim, options)
    yield Point("sm_90", "bfloat16", 128, "decode-small-pages")


def crowded_points() -> Iterator[Point]:
    """Every option at once, at every head_dim: what needs the most memory."""
    for architecture in ARCHITECTURES:
        for dtype in ("bfloat16", "float32"):
            for head_dim in HEAD_DIMS:
                for options in ("everything", "decode-16-by-pair", "decode-32-by-pair", "decode-64-by-pair"):
                    yield Point(architecture, dtype, head_dim, options)
