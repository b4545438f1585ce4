"""Few queries: keys split over programs and combined, for every option, and bits that depend on a row's own sequence alone."""

from __future__ import annotations

import os

import pytest
import torch
from fused_attention.triton_kernels import decode, launch, tiles

from fused_attention import attention_with_lse
from fused_attention.testing import CASES, Case, check

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
DENSE = [case for case in CASES if case.lengths_q is None]
CHOSEN = [case for case in DENSE if "+" not in case.name][::2] + [case for case in DENSE if "+" in case.name][::4]


@pytest.fixture
def everything_decodes(monkeypatch):
    """Rows of any number, and splits so short that most problems have several, the last of them ragged or empty."""
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.TileConfig(10**6, 16))
    monkeypatch.setattr(decode, "SPLIT", 16)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_case_split_over_programs_equals_the_oracle(case, everything_decodes):
    inputs = case.make()
    check(inputs.run("triton", backward=False), inputs.truth(backward=False))


@pytest.fixture
def launched(monkeypatch):
    """The launches of a call, in order: the kernel's name, and what it was given."""
    found = []
    submit = launch.submit

    def record(kernel, grid, arguments, options):
        found.append((kernel.__name__, grid))
        submit(kernel, grid, arguments, options)

    monkeypatch.setattr(launch, "submit", record)
    return found


def names(launched):
    return [name for name, _ in launched]


def test_few_queries_take_the_split_kernel_and_many_do_not(launched):
    Case("few", seqlen_q=2, seqlen_k=70, heads=6, kv_heads=2).make().run("triton", backward=False)
    assert names(launched) == ["split_kernel", "combine_kernel"]
    launched.clear()
    Case("short", seqlen_q=2, seqlen_k=31, heads=6, kv_heads=2).make().run("triton", backward=False)
    assert names(launched) == ["split_kernel"]
    launched.clear()
    Case("many", seqlen_q=17, seqlen_k=70).make().run("triton", backward=False)
    assert names(launched) == ["forward_kernel"]


def test_a_window_launches_no_more_splits_than_it_can_see(launched):
    Case("window", batch=1, heads=1, seqlen_q=1, seqlen_k=640, window=(40, 0)).make().run("triton", backward=False)
    assert dict(launched)["split_kernel"] == (2,)
    launched.clear()
    Case("all", batch=1, heads=1, seqlen_q=1, seqlen_k=640).make().run("triton", backward=False)
    assert dict(launched)["split_kernel"] == (20,)


def test_a_row_keeps_its_bits_beside_other_members_and_in_a_longer_cache():
    inputs = Case("members", batch=3, heads=4, kv_heads=2, seqlen_q=1, seqlen_k=90, kv_lengths=(37, 90, 64)).make()
    out, lse = attention_with_lse(inputs.q, inputs.k, inputs.v, backend="triton", kv_lengths=inputs.options["kv_lengths"])
    for member, length in enumerate((37, 90, 64)):
        row = slice(member, member + 1)
        alone = attention_with_lse(inputs.q[row], inputs.k[row, :, :length], inputs.v[row, :, :length], backend="triton")
        assert torch.equal(alone.out[0], out[member])
        assert torch.equal(alone.lse[0], lse[member])


def test_a_step_equals_the_last_row_of_the_whole_forward():
    inputs = Case("whole", batch=2, heads=4, kv_heads=2, seqlen_q=70, seqlen_k=70, causal=True, softcap=3.0).make()
    truth = inputs.truth(backward=False)
    step = inputs.changed(q=inputs.q[:, :, -1:])
    expected = step.truth(backward=False)
    torch.testing.assert_close(expected.out, truth.out[:, :, -1:], rtol=1e-12, atol=1e-12)
    check(step.run("triton", backward=False), expected)
