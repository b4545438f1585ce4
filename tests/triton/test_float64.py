"""The logic of the kernels with rounding out of the way: in float64 every result is within 1e-12 of the truth.

The same source takes its accumulate dtype from its inputs. A wrong mask, index, scale or a missing term is off by more than any rounding.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels import tiles

from fused_attention.testing import CASES, Case

# One or two of each group of cases, and whatever mixes many options.
NAMES = (
    "base", "causal+gqa", "window+offset", "mqa", "long-window", "head-dim-65", "more-queries", "first-rows-empty", "offset-members",
    "window-both", "kv-range-window", "mask-b11k", "bias-2d", "bias-1hqk", "bias-bh1k", "bias-1hq1", "bias-hides", "alibi-offset",
    "softcap-steep", "scale-negative", "dropout-gqa-causal", "sinks-dropout-kv", "gemma", "decode", "everything",
    "packed-causal", "packed-offsets", "packed-alibi-members", "packed-unused-sinks", "packed-everything",
)  # fmt: skip
PROBLEMS = {case.name: replace(case, dtype=torch.float64) for case in CASES}
MOST_ROWS = 64  # that the kernel with split keys takes


def near(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype is torch.float64
    scale = expected[expected.isfinite()].abs().amax().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * scale, msg=lambda text: f"{name}: {text}")


def has_few_rows(case: Case) -> bool:
    return case.lengths_q is None and case.seqlen_q * case.heads // (case.kv_heads or case.heads) <= MOST_ROWS


@pytest.mark.parametrize("name", NAMES)
def test_a_case_in_float64_is_the_truth(name, monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda _, name, *__: tiles.TileConfig(0 if name == "decode" else 16, 16))
    inputs = PROBLEMS[name].make()
    truth = inputs.truth()
    for result, got in inputs.run("triton").items():
        near(result, got, truth.values[result])


@pytest.mark.parametrize("name", [name for name in NAMES if has_few_rows(PROBLEMS[name])])
def test_a_case_with_split_keys_in_float64_is_the_truth(name, monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.TileConfig(MOST_ROWS, 16))
    inputs = PROBLEMS[name].make()
    truth = inputs.truth(backward=False)
    for result, got in inputs.run("triton", backward=False).items():
        near(result, got, truth.values[result])
