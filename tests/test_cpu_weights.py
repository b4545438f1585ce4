"""The CPU kernel of attention_weights: the oracle's probabilities within tier 1, the same bits always, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention import attention_weights, attention_with_lse, cpu_weights, reference
from fused_attention.cpu_backend import CpuBackend
from fused_attention.testing import CASES, Case

from .sanitize.problems import LONG, weights

MISSING = CpuBackend().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
PLAIN = Case("plain", heads=4, kv_heads=2, seqlen_q=67, seqlen_k=139, head_dim=24)
TYPED = [replace(case, name=f"{case.name}-{dtype}", dtype=dtype) for case in LONG for dtype in (torch.float64, torch.bfloat16)]
DENSE = [case for case in (*CASES, *LONG, *TYPED) if case.lengths_q is None and case.seqlen_k > 0]


@pytest.fixture
def without_the_definition(monkeypatch):
    def refuse(*_):
        raise AssertionError("the definition was called")

    monkeypatch.setattr(reference, "attention_weights", refuse)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_weights_and_their_mean_lie_within_the_bound(case, monkeypatch):
    inputs = case.make()
    lse = attention_with_lse(inputs.q, inputs.k, inputs.v, **inputs.options).lse
    if not (lse.masked_fill(lse == -torch.inf, 0.0).abs() > cpu_weights.LARGEST_LSE).any():
        monkeypatch.setattr(reference, "attention_weights", None)  # what calls it fails
    problem = weights(case)
    problem.judge(problem.run())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_threads_and_the_rest_of_the_batch_change_no_bit(dtype, average):
    inputs = replace(PLAIN, batch=3, causal=True, dropout_p=0.3).make(dtype=dtype)
    lse = attention_with_lse(inputs.q, inputs.k, inputs.v, **inputs.options).lse
    before = torch.get_num_threads()
    results = []
    try:
        for threads, members in ((1, 3), (2, 3), (5, 3), (1, 1)):
            torch.set_num_threads(threads)
            q, k, rows = inputs.q[:members], inputs.k[:members], lse[:members]
            results.append(attention_weights(q, k, rows, average_heads=average, **inputs.options)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("place", ["hidden key", "visible key", "query"])
def test_nan_reaches_the_rows_that_see_it(place, without_the_definition):
    inputs = replace(PLAIN, seqlen_k=67, causal=True).make()
    clean = attention_with_lse(inputs.q, inputs.k, inputs.v, causal=True).lse
    q, k = inputs.q.clone(), inputs.k.clone()
    (q if place == "query" else k)[:, :, {"hidden key": 66, "visible key": 40, "query": 40}[place]] = torch.nan
    # A NaN in lse goes to the definition, as every lse without digits does.
    found = attention_weights(q[:, :, :66], k, clean[:, :, :66], causal=True, offset=0, average_heads=True)
    struck = found.isnan().any(-1)[0]
    expected = {"hidden key": [], "visible key": range(40, 66), "query": [40]}[place]
    assert struck.nonzero().flatten().tolist() == list(expected)


def test_what_the_kernel_cannot_give_is_the_definitions(monkeypatch):
    inputs = PLAIN.make()
    lse = attention_with_lse(inputs.q, inputs.k, inputs.v).lse
    calls = []
    definition = reference.attention_weights
    monkeypatch.setattr(reference, "attention_weights", lambda *arguments: calls.append(arguments) or definition(*arguments))
    attention_weights(inputs.q, inputs.k, lse)
    assert not calls
    attention_weights(inputs.q, inputs.k, lse + 100.0)
    attention_weights(inputs.q.to("meta"), inputs.k.to("meta"), lse.to("meta"))
    torch.func.vmap(lambda q: attention_weights(q, inputs.k, lse))(inputs.q[None])
    torch.compile(attention_weights, backend="eager", fullgraph=True)(inputs.q, inputs.k, lse)
    torch.func.jvp(lambda q: attention_weights(q, inputs.k, lse), (inputs.q,), (inputs.q,))
    assert len(calls) == 5


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "mask": "b1qk", "bias": "1hqk", "alibi_slopes": "h", "sinks": True, "dropout_p": 0.3}]
)
def test_gradients_are_those_of_the_definition(options, average, monkeypatch):
    inputs = replace(PLAIN, seqlen_q=21, seqlen_k=23, **options).make(dtype=torch.float64)
    names = [name for name in ("bias", "alibi_slopes", "sinks") if name in inputs.options]

    def gradients():
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, *(inputs.options[name] for name in names))]
        q, k, *rest = leaves
        given = inputs.options | dict(zip(names, rest, strict=True))
        lse = attention_with_lse(q, k, inputs.v, **given).lse
        weights = attention_weights(q, k, lse, average_heads=average, **given)
        first = torch.autograd.grad(weights.square().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(x.square().sum() for x in first), leaves, materialize_grads=True)

    found = gradients()
    monkeypatch.setattr(cpu_weights, "computes", lambda *_: False)
    torch.testing.assert_close(found, gradients())


def test_weights_that_nobody_learns_from_keep_no_matrix():
    inputs = PLAIN.make()
    q, k = (x.clone().requires_grad_() for x in (inputs.q, inputs.k))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        lse = attention_with_lse(q, k, inputs.v).lse
        attention_weights(q, k, lse, average_heads=True)
    assert sizes
    assert max(sizes) <= max(q.numel(), k.numel())


def test_autocast_around_backward_changes_no_gradient():
    inputs = PLAIN.make()
    lse = attention_with_lse(inputs.q, inputs.k, inputs.v).lse
    found = []
    for enabled in (False, True):
        q = inputs.q.clone().requires_grad_()
        weights = attention_weights(q, inputs.k, lse)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(weights.square().sum(), q)
    assert torch.equal(*found)
