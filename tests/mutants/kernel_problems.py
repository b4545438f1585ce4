"""Problems whose results change with a fault in the Triton kernels, those that notice most first, and the tiles they are cut into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fused_attention.testing import CASES, Case

NAMED = {case.name: case for case in CASES}
GQA: dict[str, Any] = {"heads": 4, "kv_heads": 2}
ONE: dict[str, Any] = {"batch": 1, "heads": 1}

# Rows and keys of a tile: unlike in unlike passes, so that one taken for another is noticed.
TILES = {
    "forward": (16, 16), "decode": (16, 16), "delta": (32, 16), "dkv": (16, 32), "dk": (16, 16), "dv": (32, 16), "dq": (32, 16),
    "dbias": (16, 16),
}  # fmt: skip
SPLIT = 32
FORWARD, DECODE = 0, 64  # most rows that the kernel with split keys takes

# Each is here for what no earlier one notices; windows and lengths end before, on and behind the edges of tiles.
PROBLEMS: tuple[tuple[Case, int], ...] = (
    (replace(NAMED["everything"], **GQA), FORWARD),
    (NAMED["packed-everything"], FORWARD),
    (Case("window-14", **ONE, seqlen_q=50, seqlen_k=67, window=(20, 3), offset=14), FORWARD),
    (Case("window-13", **ONE, seqlen_q=50, seqlen_k=67, window=(27, 2), offset=13, softcap=1.3), FORWARD),
    (Case("window-16", **ONE, seqlen_q=50, seqlen_k=67, window=(17, 16), offset=16), FORWARD),
    (Case("window-narrow", **ONE, seqlen_q=40, seqlen_k=50, window=(3, 2)), FORWARD),
    (Case("window-15", **ONE, seqlen_q=34, seqlen_k=50, window=(None, 15), offset=15), FORWARD),
    (Case("causal", **ONE, seqlen_q=35, seqlen_k=51, causal=True), FORWARD),
    (Case("ranges", heads=1, seqlen_q=18, seqlen_k=67, kv_lengths=((17, 64), (15, 49)), alibi_slopes="bh"), FORWARD),
    (Case("ranges-right", heads=1, seqlen_q=18, seqlen_k=50, kv_lengths=((16, 47), (0, 33)), window=(None, 9)), FORWARD),
    (Case("lengths", heads=1, seqlen_q=18, seqlen_k=50, kv_lengths=(48, 17), window=(21, None)), FORWARD),
    (Case("softcap", **ONE, softcap=1.5, scale=0.6), FORWARD),
    (Case("softcap-wide", **ONE, softcap=1e4), FORWARD),
    (Case("low", **ONE, seqlen_k=1, magnitude=1e5), FORWARD),
    (NAMED["first-rows-empty"], FORWARD),
    (Case("plain", **(ONE | GQA), seqlen_q=33, seqlen_k=35, head_dim=40, head_dim_v=81), FORWARD),
    (Case("packed", lengths_q=(5, 0, 21, 1), lengths_k=(7, 3, 40, 0), head_dim=33, causal=True, heads=2, kv_heads=1), FORWARD),
    (Case("split", batch=2, seqlen_q=3, seqlen_k=69, head_dim_v=35, sinks=True, dropout_p=0.3, window=(50, None), **GQA), DECODE),
    *((replace(NAMED[f"bias-{pattern}"], head_dim=3), FORWARD) for pattern in ("1h11", "1hqk", "bh1k", "1hq1", "11qk", "2d")),
    (Case("bias", heads=2, seqlen_q=18, seqlen_k=35, bias="b1qk", dropout_p=0.4, mask="1hqk", softcap=2.0, causal=True), FORWARD),
    (NAMED["large-scores"], FORWARD),
    (NAMED["no-visible-keys-sinks"], FORWARD),
    (NAMED["no-visible-keys"], DECODE),
    (NAMED["window-huge"], FORWARD),
    (replace(NAMED["everything"], name="split-everything", **GQA), DECODE),
    (Case("split-window", **ONE, seqlen_q=5, seqlen_k=600, window=(250, 250), offset=300), DECODE),
    (Case("split-edges", **ONE, seqlen_q=4, seqlen_k=200, window=(40, 40), offset=55), DECODE),
    (Case("split-many", **ONE, seqlen_q=1, seqlen_k=600, alibi_slopes="h", sinks=True), DECODE),
    (Case("split-range", batch=3, heads=1, seqlen_q=2, seqlen_k=150, kv_lengths=((35, 140), (7, 39), (4, 4)), dropout_p=0.2), DECODE),
    (NAMED["sinks-dropout-kv"], DECODE),
    (NAMED["packed-unused-sinks"], FORWARD),
    (NAMED["packed-offsets"], FORWARD),
    (NAMED["packed-kv-lengths"], FORWARD),
    (NAMED["packed-alibi-members"], FORWARD),
    (NAMED["packed-cross"], DECODE),
    (Case("packed-none", lengths_q=(), unused=20, heads=1), FORWARD),
    (NAMED["alibi-offset"], FORWARD),
    (NAMED["mask-bh1k"], FORWARD),
    (NAMED["mask-blocks"], FORWARD),
    (Case("split-mask", heads=4, kv_heads=2, seqlen_q=3, seqlen_k=150, mask="bhqk", mask_block=32, window=(110, None)), DECODE),
    (Case("mask-causal", **ONE, seqlen_q=64, seqlen_k=40, mask="11qk", causal=True, offset=0), FORWARD),
    (NAMED["bias-mask"], DECODE),
    (Case("bias-mask-heads", batch=1, heads=3, seqlen_q=34, seqlen_k=40, bias="11qk", mask="1hqk", mask_block=16), FORWARD),
    (NAMED["dropout-all"], FORWARD),
    (Case("many-rows", **ONE, seqlen_q=1030, seqlen_k=2, head_dim=3, alibi_slopes="h"), FORWARD),
    (NAMED["softcap-steep"], FORWARD),
    *((replace(NAMED[f"layout-{layout}"], batch=1, sinks=True), FORWARD) for layout in ("strided", "column")),
    (Case("half", heads=1, seqlen_k=99, sinks=True, dtype=torch.float16), FORWARD),
    (Case("bfloat16", heads=1, seqlen_k=40, causal=True, dtype=torch.bfloat16), DECODE),
)  # fmt: skip
IN_FLOAT64 = tuple(replace(case, dtype=torch.float64) for case, _ in PROBLEMS[:2])
