"""The CUDA kernels on a simulated GPU: within the bounds, forward and backward, with every access in bounds and every barrier in place."""

from __future__ import annotations

import math

import pytest
import torch

from fused_attention import KVCache, attention_with_cache, attention_with_lse
from fused_attention.testing import Case, check

from .problems import (
    DTYPES,
    FEW,
    LONG,
    SHARED,
    SHORT,
    SPLIT,
    run,
    run_pages,
    run_with_a_broken_key_in_a_window,
    run_with_broken_keys_that_nobody_sees,
    run_with_broken_values,
    run_with_equal_scores,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shared_cases(simulation, dtype):
    """One test for all of them: a test each would cost more than the kernels."""
    for case in SHARED if dtype is torch.bfloat16 else FEW:
        run(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_problems_of_several_tiles(simulation, case, dtype):
    if dtype is torch.float16 and case not in LONG[::3]:
        pytest.skip("float16 runs the code of bfloat16 with other conversions, and a third of the problems has them all")
    run(case, dtype)


@pytest.mark.parametrize("case", [LONG[0], LONG[6]], ids=lambda case: case.name)
def test_the_order_of_the_warps_changes_no_bit(simulation, case, monkeypatch):
    results = []
    for seed in (0, 1, 2):
        monkeypatch.setattr(simulation, "seed", seed)
        results.append(run(case, torch.bfloat16))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_a_member_of_a_batch_has_the_bits_it_has_alone(simulation):
    inputs = Case("batch", batch=3, heads=2, kv_heads=1, seqlen_q=65, seqlen_k=70, head_dim=64, causal=True).make(dtype=torch.bfloat16)
    together = inputs.run("cuda")
    own = {name: getattr(inputs, name)[1:2] for name in ("q", "k", "v", "dout", "dlse")}
    for name, tensor in inputs.changed(**own).run("cuda").items():
        assert torch.equal(together[name][1:2], tensor), name


def test_a_loss_of_out_alone(simulation):
    inputs = LONG[3].make(dtype=torch.bfloat16).changed(dlse=None)
    check(inputs.run("cuda"), inputs.truth())


def test_keys_without_gradients_of_queries_and_the_reverse(simulation):
    """Each pass runs alone where nobody needs the other."""
    inputs = LONG[0].make(dtype=torch.bfloat16)
    whole = inputs.run("cuda")
    for wanted in (("q",), ("k", "v"), ("v",)):
        leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wanted) for name in ("q", "k", "v")}
        out, lse = attention_with_lse(**leaves, **inputs.options, backend="cuda")
        gradients = torch.autograd.grad((out, lse), tuple(leaves[name] for name in wanted), (inputs.dout, inputs.dlse))
        for name, gradient in zip(wanted, gradients, strict=True):
            assert torch.equal(gradient, whole[f"d{name}"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "options"])
def test_a_value_that_is_not_finite_reaches_exactly_the_rows_that_see_it(simulation, value, options):
    run_with_broken_values(torch.bfloat16, value, **options)


def test_a_value_that_is_not_finite_reaches_the_rows_that_see_it_where_blocks_share_the_keys(simulation):
    run_with_broken_values(torch.bfloat16, math.nan, SPLIT, 515)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_in_pages_give_the_bits_of_keys_in_a_row(simulation, dtype):
    run_pages(dtype)


def test_a_member_has_its_bits_alone_where_blocks_share_the_keys(simulation):
    inputs = SPLIT.make(dtype=torch.bfloat16)
    together, own = inputs.run("cuda", backward=False), {name: getattr(inputs, name)[1:] for name in ("q", "k", "v")}
    for name, tensor in inputs.changed(**own).run("cuda", backward=False).items():
        assert torch.equal(together[name][1:], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_member_of_a_cache_has_its_bits_alone(simulation, dtype):
    """A longer member lets all be shown more keys; alone a short one was once computed by another kernel."""
    x = torch.randn(2, 2, 520, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    q = x[:, :, 3:5].repeat(1, 2, 1, 1)

    def output(members: slice, lengths: list[int]) -> torch.Tensor:
        cache = KVCache(len(lengths), 600, 2, 64, dtype=dtype)
        rows = max(lengths)
        cache.append(x[members, :, :rows], x[members, :, :rows].flip(3), new_lengths=torch.tensor(lengths))
        return attention_with_cache(q[members], cache, causal=True, backend="cuda")

    assert torch.equal(output(slice(0, 1), [250]), output(slice(0, 2), [250, 520])[:1])


def test_a_key_that_is_not_a_number_reaches_the_gradients_of_what_its_rows_see(simulation):
    """A hidden pair of a row whose lse was nan had a weight of nan."""
    run_with_a_broken_key_in_a_window(torch.bfloat16)


@pytest.mark.parametrize("options", [{"causal": True, "offset": -5}, {"mask": SHORT}], ids=["plain", "options"])
def test_hidden_keys_that_are_not_numbers_change_nothing(simulation, options):
    """Queries past the last, which nobody hid from them, once gave them gradients of nan."""
    run_with_broken_keys_that_nobody_sees(torch.bfloat16, **options)


def test_rescaling_by_one_rounds_nothing(simulation):
    """The rounding of the maximum entered the factor of every tile, and their product left the bounds after some hundred."""
    run_with_equal_scores(torch.bfloat16)


def test_a_full_tile_takes_the_products_that_theory_says(simulation):
    """128 queries, 64 keys, 64 columns: two products of 128 x 64 x 64 in pieces of 16 x 8 x 16."""
    inputs = Case("tile", batch=1, heads=1, seqlen_q=128, seqlen_k=64, head_dim=64).make(dtype=torch.bfloat16)
    inputs.run("cuda", backward=False)
    assert simulation.work["products"] == 2 * (128 // 16) * (64 // 8) * (64 // 16)
