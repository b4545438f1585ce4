"""NaN around every buffer: nothing outside a tensor is read or written, every output element is written, and inputs stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_attention.testing import CASES, Case, Inputs, check

from .margins import Margins
from .target import Target, at_size, sample

NAMES = (
    "base", "causal-self", "window-both", "kv-range-window", "kv-untrusted", "mask-bh1k", "bias-1h11", "bias-bhqk", "bias-hides",
    "alibi-batch", "head-dim-65", "more-queries", "decode", "one-query", "no-visible-keys-sinks", "sinks-dropout-kv", "everything",
    "layout-transposed", "layout-interleaved", "layout-strided", "layout-column", "packed-everything", "packed-unused-sinks",
    "packed-strided", "many-heads",
)  # fmt: skip
TILES: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 131, "seqlen_k": 259}
LARGER = (
    *(Case(f"tiles-{dim}", **TILES, head_dim=dim, causal=True) for dim in (64, 80, 128, 256)),
    Case("tiles-bias", **TILES, head_dim=64, bias="1hqk", mask="b11k"),
    Case("tiles-decode", **(TILES | {"seqlen_q": 1, "seqlen_k": 4099}), head_dim=128, kv_lengths=(4099, 70)),
    Case("tiles-packed", heads=4, kv_heads=2, lengths_q=(131, 0, 259, 1), head_dim=64, causal=True, unused=3),
)
PROBLEMS = [replace(case, dtype=torch.bfloat16) for case in (*LARGER, *(case for case in CASES if case.name in NAMES))]
# 512 elements keep a tensor's alignment, so that its kernel loads vectors; 513 take it away.
MARGINS = (512, 513)


def test_every_named_case_exists() -> None:
    assert set(NAMES) <= {case.name for case in CASES}


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("case", sample(PROBLEMS), ids=lambda case: case.name)
def test_nothing_outside_is_touched(
    case: Case, margin: int, machine: Target, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    inputs = at_size(case, machine).make(machine.device)
    truth = inputs.truth()
    margins = Margins(machine.device, margin)
    placed = place(inputs, margins)
    before = [each.buffer.clone() for each in margins.placed]
    margins.catch_allocations(monkeypatch)
    results = placed.run(machine.backend)
    monkeypatch.undo()
    assert len(margins.placed) > len(before), "no allocation was caught, so none was checked"
    record_property("used", check(results, truth).used)
    assert not margins.damaged(), "bytes beside these tensors were written"
    changed = [each.name for each, bytes_before in zip(margins.placed, before, strict=False) if not torch.equal(each.buffer, bytes_before)]
    assert not changed, "these inputs were changed"


def place(inputs: Inputs, margins: Margins) -> Inputs:
    named = {name: margins.copy(name, getattr(inputs, name)) for name in ("q", "k", "v", "dout", "dlse")}
    tensors = {name: value for name, value in inputs.options.items() if isinstance(value, torch.Tensor)}
    return inputs.changed(**named, options={name: margins.copy(name, value) for name, value in tensors.items()})
