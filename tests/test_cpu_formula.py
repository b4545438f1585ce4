"""The C++ CPU kernels against their definition in float64: lengths, windows, head dims and groups, and what is not finite."""

from __future__ import annotations

import pytest
import torch

from .cpu_calls import check, compiled, make, visible

DTYPES = (torch.float32, torch.bfloat16)  # one by one, and in pairs


@compiled
class TestFormula:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("seqlen", [1, 3, 17, 63, 65, 129, 257, 300])
    def test_lengths(self, seqlen, causal):
        check(make(seqlen, seqlen, 24, batch=1, window_right=0 if causal else None))

    @pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 131), (131, 1), (37, 260), (260, 37), (128, 129), (65, 64)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_queries_and_keys_differ(self, seqlen_q, seqlen_k, causal):
        check(make(seqlen_q, seqlen_k, window_right=0 if causal else None))

    @pytest.mark.parametrize(
        ("head_dim", "head_dim_v"), [(1, 1), (3, 8), (8, 3), (17, 40), (40, 17), (64, 64), (80, 80), (128, 96), (192, 128), (5, 257)]
    )
    def test_head_dims(self, head_dim, head_dim_v):
        check(make(67, 140, head_dim, head_dim_v, batch=1, window_right=0))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (5, 5)])
    @pytest.mark.parametrize("seqlen_q", [1, 5, 70])
    def test_groups(self, heads, kv_heads, seqlen_q):
        check(make(seqlen_q, 70, heads=heads, kv_heads=kv_heads, window_right=0))

    @pytest.mark.parametrize("window", [(0, 0), (3, 5), (40, None), (None, 17), (130, 130), (2**62, 2**62), (0, 2**70)])
    @pytest.mark.parametrize("offset", [None, 0, -9, 61])
    def test_windows(self, window, offset):
        check(make(150, 170, batch=1, window_left=window[0], window_right=window[1], offset=offset))

    @pytest.mark.parametrize("offset", [2**63 - 1, -(2**63), 2**70, -(2**70)])
    def test_far_offsets(self, offset):
        for window in ((None, 0), (0, None), (0, 0), (7, 2**40)):
            call = make(20, 30, batch=1, window_left=window[0], window_right=window[1], offset=offset)
            results = check(call)
            assert not results["out"][~visible(call.problem).any(-1)[:, None].expand(1, 2, 20)].any()

    def test_offset_for_each_member(self):
        offset = torch.tensor([5, -3, 2**63 - 1, -(2**63)])
        for window in ((8, 2), (None, 2), (8, None)):
            check(make(33, 40, batch=4, window_left=window[0], window_right=window[1], offset=offset))
        check(make(33, 40, batch=3, window_right=0, offset=torch.tensor([[5, 0], [-40, 0], [200, 0]], dtype=torch.int32)[:, 0]))

    def test_lengths_of_members(self):
        lengths = torch.tensor([0, 1, 128, 129, 150, 151, -7, 2**62])
        for dtype in (torch.int32, torch.int64):
            check(make(40, 150, batch=8, kv_lengths=lengths.clamp(-(2**31), 2**31 - 1).to(dtype)))
            check(make(40, 150, batch=8, window_right=0, kv_lengths=lengths.clamp(-(2**31), 2**31 - 1).to(dtype)))

    def test_intervals_of_members(self):
        lengths = torch.tensor([[0, 150], [7, 9], [130, 150], [9, 7], [-5, 2**40], [2**62, 2**63 - 1], [-(2**63), 3], [150, 150]])
        for options in ({}, {"window_right": 0}, {"window_left": 20, "window_right": 3}):
            check(make(40, 150, batch=8, kv_lengths=lengths, **options))
            check(make(40, 150, batch=8, kv_lengths=lengths.t().contiguous().t(), **options))

    @pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 3.0])
    def test_scales(self, scale):
        check(make(50, 140, 32, window_right=0, scale=scale))

    def test_without_a_gradient_of_lse(self):
        check(make(50, 140, window_right=0).but(dlse=None))

    def test_rows_that_see_nothing(self):
        results = check(make(50, 20, window_right=0))
        assert (results["lse"][:, :, :30] == -torch.inf).all()
        assert not results["out"][:, :, :30].any()
        assert not results["dq"][:, :, :30].any()
        assert results["out"][:, :, 30:].all()

    @pytest.mark.parametrize("sizes", [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
    def test_empty_sizes(self, sizes):
        seqlen_q, seqlen_k, batch = sizes
        check(make(seqlen_q, seqlen_k, batch=batch))

    def test_no_query_heads(self):
        results = make(5, 7, heads=0).run()
        assert results["dk"].shape == (2, 2, 7, 16)
        assert not results["dk"].any()
        assert not results["dv"].any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("options", [{"window_right": 0}, {"window_left": 9, "window_right": 4}, {"window_left": 140}], ids=str)
    def test_what_is_not_finite_reaches_the_rows_that_see_it(self, bad, options, dtype):
        call = make(90, 150, 20, batch=1, kv_lengths=torch.tensor([[2, 149]]), **options).to(dtype)
        seen = visible(call.problem)[0]
        clean = call.run()
        for key in (0, 1, 2, 70, 100, 101, 127, 128, 148, 149):
            rows = seen[:, key]
            keys = seen[rows].any(0)
            for name in ("k", "v"):
                spoiled = getattr(call, name).clone()
                spoiled[0, 0, key, 3] = bad
                results = call.but(**{name: spoiled}).run()
                # An infinite score of the right sign is a weight of 0 or leaves one key alone, by IEEE's rules.
                sure = name == "v" or bad != bad
                touched = {"out": rows, "dq": rows, "dk": keys, "dv": keys if name == "k" else torch.zeros_like(keys)}
                for tensor, where in touched.items():
                    got, before = results[tensor][0], clean[tensor][0]
                    assert torch.equal(got[0, ~where], before[0, ~where]), f"{name}[{key}] = {bad} leaks into {tensor}"
                    assert torch.equal(got[1], before[1]), f"{name}[{key}] = {bad} leaks into another head's {tensor}"
                    if sure:
                        assert (~got[0, where].isfinite()).any(-1).all(), f"{name}[{key}] = {bad} is lost from {tensor}"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
    @pytest.mark.parametrize("name", ["q", "dout"])
    @pytest.mark.parametrize("hidden_by", ["window", "mask"])
    def test_a_query_that_is_not_finite_reaches_the_keys_it_sees(self, hidden_by, name, options, dtype):
        call = make(90, 150, 20, batch=1, window_left=20, window_right=0, **options).to(dtype)
        seen = visible(call.problem)[0]
        if hidden_by == "mask":
            call = call.but(options=call.options | {"window_left": None, "window_right": None, "mask": seen[None, None]})
        clean = call.run()
        for row in (0, 1, 31, 32, 70, 89):
            spoiled = getattr(call, name).clone()
            spoiled[0, 0, row] = torch.nan
            results = call.but(**{name: spoiled}).run()
            others = torch.arange(90) != row
            assert torch.equal(results["dq"][0, 0, others], clean["dq"][0, 0, others])
            for tensor in ("dk", "dv"):
                got, before = results[tensor][0, 0], clean[tensor][0, 0]
                assert torch.equal(got[~seen[row]], before[~seen[row]]), f"{name}[{row}] leaks into {tensor}"
                assert got[seen[row]].isnan().all(), f"{name}[{row}] is lost from {tensor}"
