"""Relations that hold up to rounding, within the elementwise bounds of their problems (tier 1), and the statistics of rows (tier 2)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fused_attention import attention, attention_weights, attention_with_lse, backends, blockwise, merge_attention
from fused_attention.testing import Case, Inputs, check, row_statistics, tier1

RUNNABLE = [name for name, reason in backends().items() if reason is None]
CASE = Case("bounded", heads=4, kv_heads=2, seqlen_q=37, seqlen_k=53, head_dim=16)


@pytest.fixture(params=RUNNABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    return request.param


def forward(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    return inputs.run(backend, backward=False)


def within(first: Tensor, second: Tensor, bound: Tensor, share: float = 1.01) -> None:
    error = torch.where(first == second, 0.0, (first - second).abs())
    assert (error <= share * bound).all(), f"differ by {(error / bound).max():.3g} bounds"


@pytest.mark.parametrize("causal", [False, True])
def test_t1_the_mean_of_ones_is_one(causal, backend):
    inputs = CASE.make().changed(options={"causal": causal})
    ones = inputs.changed(v=torch.ones_like(inputs.v))
    within(forward(ones, backend)["out"].double(), torch.ones(1), tier1(ones.truth(backward=False))["out"])


def test_t1_one_hot_values_read_the_weights(backend):
    inputs = replace(CASE, seqlen_k=23, head_dim_v=23, causal=True).make()
    one_hot = inputs.changed(v=torch.eye(23).expand(2, 2, 23, 23))
    output, truth = forward(one_hot, backend), one_hot.truth(backward=False)
    check(output, truth)
    weights = attention_weights(inputs.q, inputs.k, output["lse"], **inputs.options)
    within(weights.double(), truth.out, tier1(truth)["out"])


def test_t2_out_stays_in_the_hull_of_the_values(backend):
    inputs = CASE.make()
    output, bound = forward(inputs, backend)["out"], tier1(inputs.truth(backward=False))["out"]
    v = inputs.v.repeat_interleave(2, dim=1)
    assert (output <= v.amax(2, keepdim=True) + bound).all()
    assert (output >= v.amin(2, keepdim=True) - bound).all()


def test_t3_a_vector_added_to_all_keys_changes_nothing_but_lse(backend):
    inputs = CASE.make()
    moved = inputs.changed(k=inputs.k + 3.0)
    first, second = forward(inputs, backend), forward(moved, backend)
    bounds = [tier1(call.truth(backward=False)) for call in (inputs, moved)]
    # The sum k + 3 is itself rounded, by up to 2**-23 for these values.
    rounding = 16**-0.5 * 2.0**-22 * inputs.q.abs().sum(-1)
    within(first["out"], second["out"], sum(bound["out"] for bound in bounds) + (2 * rounding * inputs.v.abs().amax())[..., None])
    shift = 3.0 * 16**-0.5 * inputs.q.double().sum(-1)
    within(first["lse"] + shift, second["lse"].double(), sum(bound["lse"] for bound in bounds) + rounding)


def test_t4_keys_in_another_order(backend):
    inputs, order = CASE.make(), torch.randperm(53, generator=torch.Generator().manual_seed(1))
    first, second = forward(inputs, backend), forward(inputs.changed(k=inputs.k[:, :, order], v=inputs.v[:, :, order]), backend)
    bounds = tier1(inputs.truth(backward=False))
    for name in ("out", "lse"):
        within(first[name], second[name], 2 * bounds[name])


@pytest.mark.parametrize("cuts", [(0, 53), (0, 1, 20, 20, 52, 53), (0, 16, 32, 48, 53)])
@pytest.mark.parametrize("sinks", [False, True])
def test_t5_t7_parts_of_the_keys_merge_into_the_whole(cuts, sinks, backend):
    """Any partition, empty parts included, at once, as a chain and as a tree."""
    inputs = replace(CASE, sinks=sinks, causal=True).make()
    truth, sink = inputs.truth(backward=False), inputs.options.get("sinks")
    parts = []
    for start, end in pairwise(cuts):
        own = {"sinks": None, "offset": 53 - 37 - start}
        part = inputs.changed(k=inputs.k[:, :, start:end], v=inputs.v[:, :, start:end], options=own)
        parts.append(forward(part, backend))
    outs, lses = [part["out"] for part in parts], [part["lse"] for part in parts]
    at_once = merge_attention(outs, lses, sinks=sink)
    chain = merge_attention(outs[:1], lses[:1])
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        chain = merge_attention([chain.out, out], [chain.lse, lse])
    half = (len(outs) + 1) // 2
    halves = [merge_attention(outs[part], lses[part]) for part in (slice(half), slice(half, None)) if outs[part]]
    tree = merge_attention([part.out for part in halves], [part.lse for part in halves], sinks=sink)
    for merged in (at_once, merge_attention([chain.out], [chain.lse], sinks=sink), tree):
        bounds = tier1(truth)
        within(merged.out.double(), truth.out, 3 * bounds["out"])
        within(merged.lse.double(), truth.lse, 3 * bounds["lse"])


def test_t5_merging_is_differentiable(backend):
    inputs = CASE.make(dtype=torch.float64)
    q, k, v = (tensor.requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    parts = [Inputs(q, k[:, :, cut], v[:, :, cut], {}, inputs.dout, inputs.dlse) for cut in (slice(0, 20), slice(20, 53))]
    outputs = [attention_with_lse(part.q, part.k, part.v, backend=usable(part, backend)) for part in parts]
    merged = merge_attention([output.out for output in outputs], [output.lse for output in outputs])
    gradients = torch.autograd.grad(tuple(merged), (q, k, v), (inputs.dout, inputs.dlse))
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        torch.testing.assert_close(gradient, inputs.truth().values[name], rtol=1e-10, atol=1e-12)


def usable(inputs: Inputs, backend: str) -> str:
    reason = inputs.explain().reasons[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return backend


def test_t6_a_decode_step_is_the_last_row(backend):
    inputs = replace(CASE, causal=True).make()
    bounds, whole = tier1(inputs.truth(backward=False)), forward(inputs, backend)
    step = forward(inputs.changed(q=inputs.q[:, :, -1:]), backend)
    for name in ("out", "lse"):
        within(step[name][:, :, 0], whole[name][:, :, -1], 2 * bounds[name][:, :, -1])


def test_t8_dropout_keeps_the_mean(backend):
    """Over many seeds the mean is the result without dropout, and the share of dropped weights is p within five deviations."""
    inputs = replace(CASE, batch=1, heads=1, kv_heads=1, seqlen_q=11, seqlen_k=17, head_dim_v=17).make()
    one_hot = inputs.changed(v=torch.eye(17)[None, None])
    usable(one_hot.changed(options={"dropout_p": 0.25, "dropout_seed": torch.tensor([0, 0])}), backend)
    plain, draws, p = forward(one_hot, backend)["out"], [], 0.25
    for seed in range(60):
        options = {"dropout_p": p, "dropout_seed": torch.tensor([7, seed])}
        draws.append(forward(one_hot.changed(options=options), backend)["out"])
    stacked = torch.stack(draws)
    count = stacked.numel()
    dropped = (stacked == 0).sum().item()
    assert abs(dropped - p * count) <= 5 * math.sqrt(p * (1 - p) * count)
    deviation = plain * math.sqrt(p / (1 - p) / 60)
    assert ((stacked.mean(0) - plain).abs() <= 6 * deviation).all()
    assert len({draw.numpy().tobytes() for draw in draws}) == 60, "two seeds drop the same weights"


def test_t9_a_key_twice_is_a_key_of_twice_the_weight(backend):
    inputs = CASE.make()
    doubled = inputs.changed(k=inputs.k.repeat(1, 1, 2, 1), v=inputs.v.repeat(1, 1, 2, 1))
    first, second = forward(inputs, backend), forward(doubled, backend)
    bounds = [tier1(call.truth(backward=False)) for call in (inputs, doubled)]
    within(first["out"], second["out"], sum(bound["out"] for bound in bounds))
    within(first["lse"] + math.log(2.0), second["lse"], sum(bound["lse"] for bound in bounds))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, lambda i: 53),
        ({"causal": True}, lambda i: min(53, i + 17)),
        ({"causal": True, "offset": 0}, lambda i: i + 1),
        ({"window": (3, 2)}, lambda i: min(52, i + 18) - (i + 13) + 1),
        ({"window": (0, 0), "offset": -5}, lambda i: int(i >= 5)),
        ({"causal": True, "kv_lengths": torch.tensor([40, 40])}, lambda i: min(40, i + 4)),
        ({"kv_lengths": torch.tensor([[9, 30], [9, 30]])}, lambda i: 21),
    ],
)
def test_tier0_lse_counts_the_keys(options, count, backend):
    """With q = 0 every visible key weighs the same, and exp(lse) is their number: the mask, without an oracle."""
    inputs = CASE.make()
    inputs = inputs.changed(q=torch.zeros_like(inputs.q), options=options)
    lse = forward(inputs, usable(inputs, backend))["lse"]
    expected = torch.tensor([float(count(i)) for i in range(37)])
    assert torch.equal(lse.exp().round(), expected.expand_as(lse))
    assert ((lse.exp() - expected).abs() < 1e-3).all()


def test_tier0_sums_of_integers_are_exact(backend):
    """Sixteen equal weights of a sixteenth and small integers: no rounding anywhere, no tolerance."""
    values = torch.randint(-8, 9, (1, 1, 16, 5), generator=torch.Generator().manual_seed(2)).float()
    q, k = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 16, 8)
    out = attention(q, k, values, backend=backend)
    assert torch.equal(out, values.mean(2, keepdim=True).expand_as(out))


def test_tier0_one_winner_takes_its_value(backend):
    """A gap of 4096 makes the weights exactly 1 and 0."""
    k = torch.zeros(1, 1, 33, 8)
    k[0, 0, 20] = 64.0
    v = torch.randn(1, 1, 33, 8)
    out = attention(torch.full((1, 1, 3, 8), 64.0), k, v, backend=backend)
    assert torch.equal(out, v[:, :, 20:21].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tier2_rows_of_16_bit_types_err_as_little_as_they_can(dtype, backend):
    inputs = Case("rows", batch=1, heads=4, seqlen_q=257, seqlen_k=257, head_dim=64, causal=True).make(dtype=dtype)
    statistics = row_statistics(forward(inputs, usable(inputs, backend))["out"], inputs.truth(backward=False))
    assert 0.35 <= statistics.median <= 0.9, str(statistics)
    assert statistics.high <= 1.6, str(statistics)
    assert statistics.largest <= 2.5, str(statistics)
    assert abs(statistics.bias) <= 5.0, str(statistics)
