"""The C++ kernel for few queries: right in every type and over several ranges of keys, and no thread or neighbour changes a bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention import attention_with_lse, backends
from fused_attention.testing import Case, Inputs, check

MISSING = backends()["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

# More than two ranges of 1024 keys, the last of them short; head dims that fill vectors of every instruction set.
BASE = Case("few-queries", batch=2, heads=8, kv_heads=2, seqlen_q=1, seqlen_k=2071, head_dim=32, head_dim_v=48)
CASES = {
    "one query": replace(BASE, heads=2),
    "a group of three": replace(BASE, heads=6),
    "a group of eight": replace(BASE, heads=16, seqlen_k=1030),
    "two queries, causal": replace(BASE, heads=4, seqlen_q=2, causal=True),
    "more lanes than keys": replace(BASE, seqlen_k=3),
    "lengths": replace(BASE, kv_lengths=(1024, 1031)),
    "intervals": replace(BASE, kv_lengths=((1023, 1030), (700, 700)), sinks=True),
    "window": replace(BASE, window=(1100, None)),
    "mask": replace(BASE, mask="bh1k"),
    "every option": replace(
        BASE, seqlen_q=2, causal=True, window=(1500, None), mask="b11k", bias="1hqk", hiding_bias=True, kv_lengths=(2000, 1500),
        alibi_slopes="bh", softcap=3.0, sinks=True, dropout_p=0.25,
    ),
}  # fmt: skip


def forward(inputs: Inputs) -> dict[str, torch.Tensor]:
    return inputs.run("cpu", backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_few_queries_equal_the_oracle(name, dtype):
    inputs = CASES[name].make(dtype=dtype)
    check(forward(inputs), inputs.truth(backward=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_do_not_change_a_bit(dtype):
    inputs = replace(BASE, batch=3, window=(1900, None)).make(dtype=dtype)
    single = forward(inputs)
    torch.set_num_threads(2)
    try:
        shared = forward(inputs)
    finally:
        torch.set_num_threads(1)
    alone = attention_with_lse(inputs.q[1:2], inputs.k[1:2], inputs.v[1:2], window=(1900, None), backend="cpu")
    for name, tensor in single.items():
        assert torch.equal(shared[name], tensor)
        assert torch.equal(getattr(alone, name), tensor[1:2])


@pytest.mark.parametrize("option", ["kv_lengths", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_hidden_keys_hold_does_not_matter(dtype, option):
    """A row of v is added for all rows of a group at once: a hidden one must not, not even with weight 0."""
    case = replace(BASE, kv_lengths=(1500, 2000)) if option == "kv_lengths" else replace(BASE, mask="bh1k")
    inputs = case.make(dtype=dtype)
    hidden = torch.arange(2071) >= torch.tensor([1500, 2000])[:, None, None, None]
    if option == "mask":
        hidden = ~inputs.options["mask"].unflatten(1, (2, 4)).any(2)  # from every head of the group
    k, v = (x.masked_fill(hidden.mT, torch.nan) for x in (inputs.k, inputs.v))
    check(forward(inputs.changed(k=k, v=v)), inputs.truth(backward=False))


def test_a_visible_nan_reaches_just_the_heads_that_see_it():
    inputs = replace(BASE, mask="bh1k").make()
    seen = inputs.options["mask"][0, :4, 0, 100]
    seen[:] = torch.tensor([True, False, True, False])  # a view: the mask itself
    v = inputs.v.clone()
    v[0, 0, 100] = torch.nan
    clean, spoiled = forward(inputs), forward(inputs.changed(v=v))
    assert torch.equal(spoiled["lse"], clean["lse"])
    assert torch.equal(spoiled["out"][0, :4].isnan().all(-1)[:, 0], seen)
    assert torch.equal(spoiled["out"][0, 4:], clean["out"][0, 4:])
    assert spoiled["out"][0, [1, 3]].isfinite().all()
