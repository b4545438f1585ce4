"""The one list of named problems that every backend, `verify` and the benchmark share.

Sizes are distinct wherever two could be mistaken for each other, and lengths are odd.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from .inputs import Case

BASE = Case("base")
GQA: dict[str, Any] = {"heads": 6, "kv_heads": 2}
SELF: dict[str, Any] = {"seqlen_q": 19, "seqlen_k": 19}

# One setting of each option; every pair of them is a case of its own, so each has to matter beside each other one.
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (4, None)},
    "offset": {"offset": 2},
    "mask": {"mask": "bhqk"},
    "bias": {"bias": "b1qk"},
    "kv_lengths": {"kv_lengths": (11, 16)},
    "alibi": {"alibi_slopes": "h"},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "scale": {"scale": 0.6},
    "gqa": GQA,
    "head_dim_v": {"head_dim_v": 5},
}
# Without something to align, an offset changes nothing.
ALIGNED = ("causal", "window", "alibi")

SHAPES = (
    Case("self", **SELF),
    Case("one-query", seqlen_q=1, seqlen_k=63, **GQA),
    Case("one-key", seqlen_k=1),
    Case("one-pair", batch=1, heads=1, seqlen_q=1, seqlen_k=1, head_dim=1),
    Case("more-queries", seqlen_q=29, seqlen_k=7),
    Case("long", batch=1, heads=2, kv_heads=1, seqlen_q=63, seqlen_k=257, head_dim=16),
    Case("long-causal", batch=1, heads=2, kv_heads=1, seqlen_q=257, seqlen_k=257, head_dim=16, causal=True),
    Case("long-window", batch=1, heads=1, seqlen_q=257, seqlen_k=257, head_dim=16, window=(40, 3)),
    Case("head-dim-1", head_dim=1, head_dim_v=3),
    Case("head-dim-65", head_dim=65, head_dim_v=33),
    Case("head-dim-128", batch=1, heads=2, kv_heads=1, seqlen_q=17, seqlen_k=33, head_dim=128),
    Case("mqa", heads=5, kv_heads=1),
    Case("many-heads", batch=3, heads=35, kv_heads=5, seqlen_q=2, seqlen_k=11, causal=True),
)
EMPTY = (
    Case("no-batch", batch=0),
    Case("no-queries", seqlen_q=0),
    Case("no-keys", seqlen_k=0),
    Case("no-keys-sinks", seqlen_k=0, sinks=True),
    Case("nothing", seqlen_q=0, seqlen_k=0, causal=True),
    Case("no-visible-keys", kv_lengths=(0, 5)),
    Case("no-visible-keys-sinks", kv_lengths=(0, 5), sinks=True, causal=True),
    Case("first-rows-empty", seqlen_q=17, seqlen_k=7, causal=True),
    Case("far-offset", offset=-9, causal=True),
)
VISIBILITY = (
    Case("causal-self", causal=True, **SELF),
    Case("causal-more-queries", causal=True, seqlen_q=23, seqlen_k=11),
    Case("causal-top-left", causal=True, offset=0),
    Case("offset-members", causal=True, offset=(1, 7)),
    Case("offset-negative", window=(3, 2), offset=-4),
    Case("window-left", window=(3, None)),
    Case("window-right", window=(None, 2)),
    Case("window-both", window=(3, 2)),
    Case("window-self", window=(0, 0), **SELF),
    Case("window-huge", window=(2**31, 2**31), causal=False, kv_lengths=(5, 17)),
    Case("kv-range", kv_lengths=((2, 11), (5, 17))),
    Case("kv-range-causal", kv_lengths=((2, 11), (5, 17)), causal=True),
    Case("kv-range-window", kv_lengths=((1, 11), (5, 17)), window=(3, 1), **GQA),
    Case("kv-untrusted", kv_lengths=(-3, 40), causal=True),
    Case("kv-range-untrusted", kv_lengths=((-5, 12), (9, 2**31 - 1)), causal=True),
    Case("kv-range-reversed", kv_lengths=((9, 4), (0, 17))),
    Case("mask-2d", mask="qk"),
    *(Case(f"mask-{pattern}", mask=pattern) for pattern in ("1111", "11qk", "b11k", "1hq1", "bh1k", "b1q1")),
    Case("causal-negative-scale", causal=True, scale=-0.3, **SELF),
    Case("causal-zero-scale", causal=True, scale=0.0, **SELF),
    Case("mask-blocks", mask="bhqk", mask_block=16, seqlen_q=35, seqlen_k=150, heads=4, kv_heads=2),
    Case("mask-causal-window", mask="b1qk", causal=True, window=(9, None), **SELF),
)
SCORES = (
    Case("bias-2d", bias="qk"),
    *(Case(f"bias-{pattern}", bias=pattern) for pattern in ("1111", "1h11", "11qk", "1hqk", "b11k", "1hq1", "bh1k", "bhqk")),
    Case("bias-hides", bias="1hqk", hiding_bias=True),
    Case("bias-hides-columns", bias="b11k", hiding_bias=True, causal=True),
    Case("bias-mask", bias="1hqk", mask="b11k", **GQA),
    Case("alibi-batch", alibi_slopes="bh", **GQA),
    Case("alibi-offset", alibi_slopes="h", offset=(-2, 9), window=(6, 3)),
    Case("scale-zero", scale=0.0, causal=True),
    Case("scale-negative", scale=-0.4, softcap=2.0),
    Case("softcap-steep", softcap=0.3, magnitude=3.0),
    Case("large-scores", magnitude=40.0, causal=True),
    Case("dropout-all", dropout_p=1.0),
    Case("dropout-gqa-causal", dropout_p=0.5, causal=True, seqlen_q=21, seqlen_k=23, **GQA),
)
MIXED = (
    Case("gemma", softcap=5.0, window=(7, None), causal=True, scale=0.3, **GQA, **SELF),
    Case("gpt-oss", sinks=True, window=(6, None), causal=True, **GQA, **SELF),
    Case("bloom", alibi_slopes="h", causal=True, kv_lengths=((3, 17), (0, 17)), dropout_p=0.2),
    Case("t5", bias="1hqk", scale=1.0, mask="b11k", dropout_p=0.1),
    Case("decode", seqlen_q=1, seqlen_k=37, kv_lengths=(21, 37), window=(19, None), sinks=True, softcap=4.0, **GQA),
    Case("alibi-bias-cap-sinks", alibi_slopes="bh", bias="1h1k", softcap=2.0, sinks=True, causal=True),
    Case("bias-cap-dropout", bias="bh1k", softcap=2.0, dropout_p=0.4, window=(5, 2)),
    Case("sinks-dropout-kv", sinks=True, dropout_p=0.4, kv_lengths=(0, 12), head_dim_v=3),
    Case(
        "everything", causal=True, window=(8, None), offset=(3, 5), mask="b1qk", bias="1hqk", hiding_bias=True,
        kv_lengths=((1, 12), (0, 17)), alibi_slopes="bh", softcap=3.0, sinks=True, dropout_p=0.25, scale=0.5, head_dim_v=5, **GQA,
    ),
)  # fmt: skip
LAYOUTS = tuple(
    Case(f"layout-{layout}", layout=layout, causal=True, head_dim_v=5, **GQA)
    for layout in ("transposed", "interleaved", "strided", "column", "expanded", "offset")
)
MEMBERS: dict[str, Any] = {"lengths_q": (5, 0, 13, 1), "lengths_k": (7, 3, 11, 0)}
PACKED = (
    Case("packed", lengths_q=(5, 11, 3)),
    Case("packed-cross", **MEMBERS),
    Case("packed-one", lengths_q=(19,), causal=True),
    Case("packed-none", lengths_q=(0, 0), lengths_k=(3, 2)),
    Case("packed-unused", unused=4, causal=True, **MEMBERS),
    Case("packed-unused-sinks", unused=4, sinks=True, **MEMBERS),
    Case("packed-causal", causal=True, **MEMBERS, **GQA),
    Case("packed-window", window=(2, 1), **MEMBERS),
    Case("packed-offset", causal=True, offset=1, **MEMBERS),
    Case("packed-offsets", window=(3, 0), offset=(2, 0, -3, 5), **MEMBERS),
    Case("packed-kv-lengths", kv_lengths=(4, 3, 20, -1), causal=True, **MEMBERS),
    Case("packed-kv-range", kv_lengths=((1, 4), (0, 3), (2, 9), (0, 1)), **MEMBERS),
    Case("packed-alibi", alibi_slopes="h", causal=True, **MEMBERS),
    Case("packed-alibi-members", alibi_slopes="bh", **MEMBERS, **GQA),
    Case("packed-softcap", softcap=1.5, **MEMBERS),
    Case("packed-sinks", sinks=True, causal=True, **MEMBERS),
    Case("packed-dropout", dropout_p=0.4, **MEMBERS, **GQA),
    Case("packed-scale", scale=-0.7, head_dim_v=5, **MEMBERS),
    Case("packed-strided", layout="strided", causal=True, **MEMBERS, **GQA),
    Case(
        "packed-everything", causal=True, window=(6, None), offset=(2, 3, -1, 0), kv_lengths=((1, 6), (0, 3), (0, 10), (0, 0)),
        alibi_slopes="bh", softcap=3.0, sinks=True, dropout_p=0.25, scale=0.5, head_dim_v=5, unused=2, **MEMBERS, **GQA,
    ),
)  # fmt: skip
ALONE = tuple(Case(name, **options) for name, options in OPTIONS.items() if name != "offset")
PAIRS = tuple(
    Case(f"{first}+{second}", **OPTIONS[first], **OPTIONS[second])
    for first, second in combinations(OPTIONS, 2)
    if first != "offset" or second in ALIGNED
)
DTYPES = tuple(
    replace(case, name=f"{case.name}-{str(dtype).removeprefix('torch.')}", dtype=dtype)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
    for case in (SHAPES[0], *MIXED[:4], MIXED[-1], PACKED[-1], EMPTY[6])
)
CASES: tuple[Case, ...] = (BASE, *ALONE, *PAIRS, *SHAPES, *EMPTY, *VISIBILITY, *SCORES, *MIXED, *LAYOUTS, *PACKED, *DTYPES)
