"""Shapes that fill real tiles many times over: every head_dim, each option beside it, odd lengths, one query over many keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_attention.testing import Case, check, row_statistics

from .target import Target, at_size, sample

SHAPE: dict[str, Any] = {"batch": 1, "heads": 4, "kv_heads": 2, "dtype": torch.bfloat16}
LONG: dict[str, Any] = SHAPE | {"seqlen_q": 1031, "seqlen_k": 1031}
HEAD_DIMS = (64, 128, 256, 80, 96, 192, 40, 112, 160, 320, 512)
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (200, None), "causal": True},
    "window-both": {"window": (130, 65)},
    "offset": {"causal": True, "offset": 300},
    "mask": {"mask": "11qk"},
    "mask-columns": {"mask": "b11k"},
    "bias": {"bias": "1hqk"},
    "bias-columns": {"bias": "b11k"},
    "alibi-softcap": {"alibi_slopes": "h", "softcap": 20.0, "causal": True},
    "dropout": {"dropout_p": 0.2, "causal": True},
    "sinks": {"sinks": True, "window": (128, None), "causal": True},
    "kv-lengths": {"batch": 2, "kv_lengths": (777, 513)},
    "everything": {
        "causal": True, "window": (400, None), "mask": "b1qk", "bias": "1hqk", "kv_lengths": (999,), "alibi_slopes": "bh", "softcap": 15.0,
        "sinks": True, "dropout_p": 0.1, "scale": 0.1,
    },
}  # fmt: skip
PACKED: dict[str, Any] = SHAPE | {"lengths_q": (515, 0, 1031, 1, 129), "causal": True}
LAYOUTS = ("transposed", "interleaved", "strided", "column", "offset")
CASES = [
    *(Case(f"full-{dim}", **LONG, head_dim=dim) for dim in HEAD_DIMS),
    *(Case(f"causal-{dim}", **LONG, head_dim=dim, causal=True) for dim in HEAD_DIMS),
    *(Case(f"{name}-{dim}", **(LONG | options), head_dim=dim) for dim in (64, 128, 256) for name, options in OPTIONS.items()),
    *(Case(f"packed-{dim}", **PACKED, head_dim=dim) for dim in (64, 128, 256)),
    *(Case(f"decode-{dim}", **(SHAPE | {"heads": 16}), seqlen_q=1, seqlen_k=4099, head_dim=dim) for dim in (64, 128, 256)),
    *(Case(f"few-queries-{dim}", **(SHAPE | {"heads": 16}), seqlen_q=5, seqlen_k=4099, head_dim=dim) for dim in (64, 128, 256)),
    Case("decode-padded", **(SHAPE | {"batch": 3, "heads": 16}), seqlen_q=1, seqlen_k=4099, head_dim=128, kv_lengths=(4099, 1, 2050)),
    Case("cross", **SHAPE, seqlen_q=517, seqlen_k=2053, head_dim=64),
    Case("more-queries", **SHAPE, seqlen_q=2053, seqlen_k=517, head_dim=64, causal=True),
    Case("long", **SHAPE, seqlen_q=2048, seqlen_k=2048, head_dim=128, causal=True),
    Case("wide-values", **LONG, head_dim=64, head_dim_v=256),
    Case("narrow-values", **LONG, head_dim=192, head_dim_v=128, causal=True),
    *(Case(f"fp32-{dim}", **(LONG | {"dtype": torch.float32}), head_dim=dim, causal=True) for dim in (64, 128, 256, 512)),
    *(Case(f"fp16-{dim}", **(LONG | {"dtype": torch.float16}), head_dim=dim, causal=True) for dim in (64, 128, 256)),
    *(Case(f"{layout}-128", **LONG, head_dim=128, causal=True, layout=layout) for layout in LAYOUTS),
]  # fmt: skip


@pytest.mark.parametrize("case", sample(CASES), ids=lambda case: case.name)
def test_a_case_equals_the_oracle(case: Case, machine: Target, record_property: Callable[[str, object], None]) -> None:
    inputs = at_size(case, machine).make(machine.device)
    report = check(inputs.run(machine.backend), inputs.truth())
    record_property("used", report.used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_errors_are_those_of_rounding(
    head_dim: int, dtype: torch.dtype, gpu: Target, record_property: Callable[[str, object], None]
) -> None:
    """Rows err by half a unit of their type: more is lost precision, much less is another type; and they lean to neither side."""
    inputs = Case("random", **(SHAPE | {"dtype": dtype}), seqlen_q=2048, seqlen_k=2048, head_dim=head_dim).make(gpu.device)
    statistics = row_statistics(inputs.run(gpu.backend, backward=False)["out"], inputs.truth(backward=False))
    record_property("rows", str(statistics))
    assert 0.35 <= statistics.median <= 0.9, statistics
    assert statistics.high <= 1.6, statistics
    assert abs(statistics.bias) <= 5.0, statistics
