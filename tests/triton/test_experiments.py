"""The experimental kernels in the interpreter: the product's own forward is their oracle, the float64 truth their bound."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

import triton
import triton.language as tl
from fused_attention.benchmarks.experiments import key_value, order, s_ahead
from fused_attention.triton_kernels import tiles

from fused_attention.testing import Case, Inputs, check
from fused_attention.validation import check as problem_of

SMALL = tiles.TileConfig(32, 16, 8, 2)
CASES = (
    (Case("full, ragged, grouped", heads=6, kv_heads=2, seqlen_q=67, seqlen_k=83, head_dim=64), torch.float16),
    (Case("causal, ragged", heads=2, seqlen_q=67, seqlen_k=83, head_dim=64, causal=True), torch.bfloat16),
    (Case("causal, square", heads=2, seqlen_q=96, seqlen_k=96, head_dim=64, causal=True), torch.float16),
    (Case("rows that see nothing", heads=2, seqlen_q=83, seqlen_k=37, head_dim=64, causal=True), torch.float16),
    (Case("fewer keys than a tile", heads=1, seqlen_q=5, seqlen_k=3, head_dim=64), torch.bfloat16),
)


def run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setitem(s_ahead.TILES, 64, SMALL)
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    s_ahead.forward(q, k, v, out, lse, problem_of(q, k, v, **inputs.options))
    return {"out": out, "lse": lse}


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda value: value.name if isinstance(value, Case) else "")
def test_scores_ahead_are_within_the_bound(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.make(dtype=dtype)
    check(run(inputs, monkeypatch), inputs.truth(backward=False))


def test_scores_ahead_have_the_bits_of_the_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every tile is seen in full both add up the same numbers in the same order."""
    inputs = Case("whole tiles", heads=4, kv_heads=2, seqlen_q=64, seqlen_k=80, head_dim=64, scale=0.3).make(dtype=torch.bfloat16)
    monkeypatch.setattr(tiles, "choose", lambda *_: SMALL)
    plain, found = inputs.run("triton", backward=False), run(inputs, monkeypatch)
    assert torch.equal(plain["out"], found["out"])
    assert torch.equal(plain["lse"], found["lse"])


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "row_tiles", "fitting"), [(2, 6, 2, 5, 1), (3, 4, 4, 3, 5), (1, 1, 1, 7, 9)])
def test_every_tile_has_one_program_and_the_longest_come_first(batch: int, heads: int, kv_heads: int, row_tiles: int, fitting: int) -> None:
    """fitting: key heads whose keys and values the cache holds."""
    section = order.section(order.L2_BYTES // fitting, batch * kv_heads) * (heads // kv_heads)
    assert section == min(fitting, batch * kv_heads) * heads // kv_heads
    count = batch * heads * row_tiles
    found = torch.empty(count, 2, dtype=torch.int32)
    order_kernel[(count,)](found, batch * heads, row_tiles, section)
    places = [tuple(each) for each in found.tolist()]
    assert len(set(places)) == count
    assert {head for head, _ in places} == set(range(batch * heads))
    for first in range(0, batch * heads, section):
        inside = [tile for head, tile in places if first <= head < first + section]
        assert inside == sorted(inside, reverse=True)
        assert {head for head, _ in places[first * row_tiles :][: len(inside)]} == set(range(first, min(first + section, batch * heads)))


@triton.jit
def order_kernel(found, batch_heads, row_tiles, section):
    head, tile = order.row_tile(tl.program_id(0), batch_heads, row_tiles, section)
    tl.store(found + 2 * tl.program_id(0), head)
    tl.store(found + 2 * tl.program_id(0) + 1, tile)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda value: value.name if isinstance(value, Case) else "")
def test_gradients_of_keys_are_within_the_bound(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(key_value.TILES, 64, tiles.TileConfig(16, 32, 8, 2))
    inputs = case.make(dtype=dtype).changed(dlse=None)
    truth = inputs.truth()
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    out, lse = (truth.values[name].float() for name in ("out", "lse"))
    delta = (out.to(dtype).float() * dout.float()).sum(-1)
    dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    key_value.key_value(dout, q, k, v, lse, delta, dk, dv, problem_of(q, k, v, **inputs.options))
    check({"dk": dk, "dv": dv}, truth)
