"""What gradients must satisfy whatever the numbers: sums that vanish or agree, each within the sum of its terms' bounds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fused_attention import backends, blockwise
from fused_attention.testing import Case, Inputs, Truth, tier1

RUNNABLE = [name for name, reason in backends().items() if reason is None]
BASE = Case("law", heads=4, kv_heads=2, seqlen_q=21, seqlen_k=37, head_dim=16, head_dim_v=9)
CASES = (
    BASE,
    replace(BASE, name="causal", causal=True),
    replace(BASE, name="empty-rows", causal=True, seqlen_q=37, seqlen_k=21),
    replace(BASE, name="window", window=(9, 4), kv_lengths=((3, 30), (0, 37))),
    replace(BASE, name="mask", mask="b1qk"),
    replace(BASE, name="bias", bias="1hqk", hiding_bias=True),
    replace(BASE, name="alibi", alibi_slopes="h", causal=True),
    replace(BASE, name="dropout", dropout_p=0.4),
    replace(BASE, name="softcap", softcap=1.5, causal=True),
    replace(BASE, name="sinks", sinks=True, causal=True),
    replace(BASE, name="mean-of-keys", magnitude=2.0),
)


@pytest.fixture(params=RUNNABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    return request.param


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Results in float64, so that the laws' own sums round nothing."""
    reason = inputs.explain().reasons[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return {name: tensor.double() for name, tensor in inputs.run(backend).items()}


@cache
def made(case: Case) -> tuple[Inputs, Truth]:
    inputs = case.make()
    return inputs, inputs.truth()


@cache
def output_of(case: Case, backend: str) -> dict[str, Tensor]:
    """Several laws speak of the same results."""
    return run(made(case)[0], backend)


def small(value: Tensor, bound: Tensor) -> None:
    assert (value.abs() <= 1.01 * bound + 1e-300).all(), f"{(value.abs() / bound).max():.3g} of its bound"


def without_lse(case: Case) -> Inputs:
    inputs = case.make()
    return inputs.changed(dlse=torch.zeros_like(inputs.dlse))


@pytest.mark.parametrize("case", [case for case in CASES if case.softcap is None and not case.sinks], ids=lambda case: case.name)
def test_g1_gradients_of_the_keys_sum_to_zero(case, backend):
    """A vector added to all keys shifts each row's scores alike: a delta that is wrong or missing shows here."""
    inputs = without_lse(case)
    small(run(inputs, backend)["dk"].sum(2), tier1(inputs.truth())["dk"].sum(2))


@pytest.mark.parametrize("case", [case for case in CASES if not case.dropout_p and not case.sinks], ids=lambda case: case.name)
def test_g2_gradients_of_the_values_sum_to_dout(case, backend):
    inputs, truth = made(case)
    alive = (truth.lse > -torch.inf)[..., None]
    expected = (inputs.dout.double() * alive).sum(2).unflatten(1, (2, 2)).sum(2)
    small(output_of(case, backend)["dv"].sum(2) - expected, tier1(truth)["dv"].sum(2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_g3_values_and_out_pair_alike_with_their_gradients(case, backend):
    inputs, truth = made(case)
    output, bounds = output_of(case, backend), tier1(truth)
    by_value = (output["dv"] * inputs.v.double()).sum()
    by_out = (inputs.dout.double() * output["out"]).sum()
    small(by_value - by_out, (bounds["dv"] * inputs.v.abs()).sum() + (bounds["out"] * inputs.dout.abs()).sum())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_g4_queries_and_keys_pair_alike_with_their_gradients(case, backend):
    inputs, truth = made(case)
    output, bounds = output_of(case, backend), tier1(truth)
    by_query, by_key = (output["dq"] * inputs.q.double()).sum(), (output["dk"] * inputs.k.double()).sum()
    small(by_query - by_key, (bounds["dq"] * inputs.q.abs()).sum() + (bounds["dk"] * inputs.k.abs()).sum())


@pytest.mark.parametrize("pattern", ["bhqk", "1hqk", "11qk"])
def test_g5_each_row_of_the_bias_gradient_sums_to_zero(pattern, backend):
    inputs = without_lse(replace(BASE, bias=pattern, causal=True))
    small(run(inputs, backend)["dbias"].sum(-1), tier1(inputs.truth())["dbias"].sum(-1))


@pytest.mark.parametrize("case", [case for case in CASES if case.softcap is None and not case.sinks], ids=lambda case: case.name)
def test_g6_a_key_column_of_ones_reads_the_row_sums(case, backend):
    """Where q is 0 and k is 1, dq is the row's sum of dS, which vanishes."""
    inputs = without_lse(case)
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., 3], k[..., 3] = 0.0, 1.0
    inputs = inputs.changed(q=q, k=k)
    small(run(inputs, backend)["dq"][..., 3], tier1(inputs.truth())["dq"][..., 3])


@pytest.mark.parametrize("last", [0, 16, 18])
def test_g7_keys_learn_nothing_from_rows_that_do_not_see_them(last, backend):
    """With dout 0 from some row on, keys that only later rows see get exactly 0, and earlier rows do not hear of the later ones."""
    inputs = replace(BASE, causal=True, seqlen_k=21).make()
    dout, dlse = inputs.dout.clone(), inputs.dlse.clone()
    dout[:, :, last + 1 :], dlse[:, :, last + 1 :] = 0.0, 0.0
    inputs = inputs.changed(dout=dout, dlse=dlse)
    output = run(inputs, backend)
    for name in ("dk", "dv"):
        assert not output[name][:, :, last + 1 :].any(), name
    q = inputs.q.clone()
    q[:, :, last + 1 :] = 5.0
    later = run(inputs.changed(q=q), backend)
    bounds = tier1(inputs.truth())
    for name in ("dk", "dv"):
        small(output[name][:, :, : last + 1] - later[name][:, :, : last + 1], 2 * bounds[name][:, :, : last + 1])


@pytest.mark.parametrize("case", [case for case in CASES if case.softcap is None and not case.sinks], ids=lambda case: case.name)
def test_g8_lse_has_a_gradient_of_its_own(case, backend):
    """A loss of lse alone moves no value, and moves the keys by scale * sum of w q (flash-attention#141: the gradient was dropped)."""
    inputs = case.make()
    inputs = inputs.changed(dout=torch.zeros_like(inputs.dout))
    output, truth = run(inputs, backend), inputs.truth()
    assert not output["dv"].any()
    alive = truth.lse > -torch.inf
    pull = truth.call.scale * (inputs.dlse.double() * alive)[..., None] * inputs.q.double()
    expected = pull.sum(2).unflatten(1, (2, 2)).sum(2)
    small(output["dk"].sum(2) - expected, tier1(truth)["dk"].sum(2))
    assert expected.abs().min() > 0.0


def test_a_missing_delta_breaks_the_first_law():
    """The law can fail: without delta, dS is A dP, whose rows do not sum to zero."""
    inputs = without_lse(BASE)
    truth = inputs.truth()
    call, wrong = truth.call, torch.zeros_like(truth.values["dk"])
    for member in range(2):
        for index in range(4):
            head = call.head(member, index)
            wrong[member, index // 2] += call.scale * (head.weights * (head.dout @ head.v.T)).T @ head.q
    with pytest.raises(AssertionError, match="of its bound"):
        small(wrong.sum(2), tier1(truth)["dk"].sum(2))
