"""Backward in bfloat16, where a dot instruction adds up pairs of dims, of queries and of keys, and the last of each may be alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_attention.testing import Case, check

from .cpu_calls import Call, compiled, equal, make

pytestmark = compiled
BASE = Case("pairs", batch=1, heads=2, seqlen_q=37, seqlen_k=139, head_dim=24, dtype=torch.bfloat16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [1, 2, 31, 65, 127, 130, 257])
def test_lengths(seqlen, causal):
    inputs = replace(BASE, seqlen_q=seqlen, seqlen_k=seqlen, causal=causal).make()
    check(inputs.run("cpu"), inputs.truth())


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (3, 2), (16, 31), (33, 16), (40, 64), (80, 48), (129, 65)])
def test_head_dims(head_dim, head_dim_v):
    inputs = replace(BASE, head_dim=head_dim, head_dim_v=head_dim_v, window=(60, 9)).make()
    check(inputs.run("cpu"), inputs.truth())


@pytest.mark.parametrize("layout", ["transposed", "interleaved", "strided", "column", "offset"])
def test_layouts(layout):
    inputs = replace(BASE, layout=layout, causal=True, head_dim_v=19).make()
    check(inputs.run("cpu"), inputs.truth())


@pytest.mark.parametrize("hides", [{"mask": "bhqk"}, {"bias": "1hqk", "hiding_bias": True}, {"kv_lengths": ((3, 138),)}], ids=str)
@pytest.mark.parametrize("options", [{}, {"alibi_slopes": "h", "softcap": 3.0, "dropout_p": 0.25, "sinks": True}], ids=str)
def test_options(hides, options):
    inputs = replace(BASE, **hides, **options).make()
    check(inputs.run("cpu"), inputs.truth())


def test_keys_that_no_query_of_an_odd_number_sees():
    """They lie in a tile with others that are seen, and what the call before left in their place must not count."""
    busy = replace(BASE, seqlen_q=12, seqlen_k=12).make()
    inputs = replace(BASE, seqlen_q=11, seqlen_k=11, causal=True, offset=-1).make()
    truth = inputs.truth()
    for name in ("dk", "dv"):
        assert not truth.values[name][:, :, 10:].any()
    check(busy.run("cpu"), busy.truth())
    check(inputs.run("cpu"), truth)


def test_where_a_row_lies_in_memory_does_not_change_a_bit():
    call = make(70, 75, 40, window_right=0).to(torch.bfloat16)
    before = call.run()
    names = ("q", "k", "v", "dout")
    moved = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    equal(before, call.but(**moved).run())
    columns = {name: getattr(call, name).mT.contiguous().mT for name in names}
    equal(before, call.but(**columns).run())
    odd = {name: torch.cat((call.q.new_zeros(1), getattr(call, name).flatten()))[1:].view_as(getattr(call, name)) for name in names}
    equal(before, call.but(**odd).run())


def test_neighbours_in_the_batch_and_threads_do_not_change_a_bit():
    lengths = torch.tensor([[0, 140], [3, 77], [9, 9]])
    call = make(45, 140, 20, batch=3, heads=4, window_right=0, kv_lengths=lengths).to(torch.bfloat16)
    whole = call.run()
    for b in range(3):
        alone = {name: getattr(call, name)[b : b + 1] for name in ("q", "k", "v", "dout", "dlse")}
        options = call.options | {"kv_lengths": lengths[b : b + 1]}
        equal({name: x[b : b + 1] for name, x in whole.items()}, Call(**alone, options=options).run())
    one_head = make(300, 520, 32, batch=1, heads=1, kv_heads=1, window_right=0).to(torch.bfloat16)  # threads share it
    before = one_head.run()
    torch.set_num_threads(2)
    try:
        equal(whole, call.run())
        equal(before, one_head.run())
    finally:
        torch.set_num_threads(1)


def test_roundings_lean_to_no_side():
    """Weights cut off instead of rounded would make every sum too small: by 2**-9 on average, within the worst case."""
    inputs = replace(BASE, heads=4, seqlen_q=256, seqlen_k=256).make()
    inputs = inputs.changed(dout=torch.ones_like(inputs.dout), dlse=None)
    truth = inputs.truth()
    error = inputs.run("cpu")["dv"].double() / truth.values["dv"] - 1
    of_key = error.mean(-1)  # all dims of a key have the same sum
    assert abs(of_key.mean()) < 5 * of_key.std() / of_key.numel() ** 0.5
