"""The public functions beside `attention`: weights, merging, PyTorch's signature, packed and nested input, autocast, explain."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fused_attention
from fused_attention import (
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_weights,
    attention_with_lse,
    explain,
    merge_attention,
    scaled_dot_product_attention,
)


def operands(*, batch=2, heads=4, kv_heads=2, seqlen_q=5, seqlen_k=7, head_dim=3, head_dim_v=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, seqlen_q, head_dim), (batch, kv_heads, seqlen_k, head_dim), (batch, kv_heads, seqlen_k, head_dim_v)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes)


SEED = torch.tensor([11, 5])
WEIGHTS_OPTIONS = {
    "plain": {},
    "causal-window": {"causal": True, "window": (3, None)},
    "mask": {"mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.5},
    "bias-alibi-softcap": {
        "bias": torch.randn(1, 4, 1, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        "alibi_slopes": torch.rand(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        "softcap": 2.0,
    },
    "sinks": {"sinks": torch.randn(4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)},
    "dropout": {"dropout_p": 0.5, "dropout_seed": SEED},
    "empty-rows": {"kv_lengths": torch.tensor([0, 3])},
}


class TestWeights:
    @pytest.mark.parametrize("name", WEIGHTS_OPTIONS)
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_weights_times_v_is_out(self, name, backend):
        q, k, v = operands()
        options = WEIGHTS_OPTIONS[name]
        out, lse = attention_with_lse(q, k, v, backend=backend, **options)
        weights = attention_weights(q, k, lse, **options)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, dim=1), out)
        torch.testing.assert_close(attention_weights(q, k, lse, average_heads=True, **options), weights.mean(1))

    @pytest.mark.parametrize("name", WEIGHTS_OPTIONS)
    def test_their_gradient_is_that_of_the_definition(self, name):
        """With lse as a function of q and k: the gradient through both must be that of a plain softmax."""
        q, k, v = operands()
        options = WEIGHTS_OPTIONS[name]

        def loss(backend):
            lse = attention_with_lse(q, k, v, backend=backend, **options).lse
            return (attention_weights(q, k, lse, **options) * torch.arange(7.0)).square().sum()

        torch.testing.assert_close(torch.autograd.grad(loss("torch"), (q, k)), torch.autograd.grad(loss("reference"), (q, k)))

    def test_rows_sum_to_one_or_to_zero(self):
        q, k, v = operands()
        lengths = torch.tensor([0, 3])
        weights = attention_weights(q, k, attention_with_lse(q, k, v, kv_lengths=lengths).lse, kv_lengths=lengths)
        torch.testing.assert_close(weights.sum(-1), torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 4, 5))

    def test_dropout_needs_the_seed_of_the_forward(self):
        q, k, v = operands()
        with pytest.raises(ValueError, match="dropout_seed is None"):
            attention_weights(q, k, attention_with_lse(q, k, v).lse, dropout_p=0.5)

    def test_lse_of_another_shape_is_refused(self):
        q, k, _ = operands()
        with pytest.raises(ValueError, match=r"lse has shape \(2, 4\)"):
            attention_weights(q, k, torch.zeros(2, 4))


class TestMerge:
    def parts(self, bounds, **options):
        q, k, v = operands(seqlen_k=11)
        return (q, k, v), [
            attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], backend="torch", **options) for a, b in itertools.pairwise(bounds)
        ]

    @pytest.mark.parametrize("bounds", [(0, 11), (0, 4, 11), (0, 0, 4, 4, 9, 11), (0, 1, 2, 3, 11)])
    def test_parts_of_the_keys_join_to_the_whole(self, bounds):
        (q, k, v), parts = self.parts(bounds)
        merged = merge_attention(*zip(*parts, strict=True))
        whole = attention_with_lse(q, k, v, backend="reference")
        torch.testing.assert_close(merged, whole)
        torch.testing.assert_close(
            torch.autograd.grad(merged.out.square().sum() + merged.lse.sin().sum(), (q, k, v)),
            torch.autograd.grad(whole.out.square().sum() + whole.lse.sin().sum(), (q, k, v)),
        )

    def test_sinks_are_added_once(self):
        sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
        (q, k, v), parts = self.parts((0, 3, 11))
        merged = merge_attention(*zip(*parts, strict=True), sinks=sinks)
        whole = attention_with_lse(q, k, v, sinks=sinks, backend="reference")
        torch.testing.assert_close(merged, whole)
        torch.testing.assert_close(torch.autograd.grad(merged.out.sum(), sinks), torch.autograd.grad(whole.out.sum(), sinks))

    def test_rows_that_no_part_saw(self):
        out, lse = torch.full((1, 2, 3, 4), torch.nan), torch.full((1, 2, 3), -torch.inf)
        merged = merge_attention([out, out], [lse, lse])
        assert torch.equal(merged.out, torch.zeros_like(out))
        assert torch.equal(merged.lse, lse)

    def test_chain_and_tree_agree(self):
        _, (a, b, c) = self.parts((0, 2, 7, 11))
        pair = merge_attention((a.out, b.out), (a.lse, b.lse))
        chain = merge_attention((pair.out, c.out), (pair.lse, c.lse))
        torch.testing.assert_close(chain, merge_attention(*zip(a, b, c, strict=True)))

    @pytest.mark.parametrize(
        ("outs", "lses", "message"),
        [
            ([], [], "outs has 0 parts"),
            ([torch.zeros(1, 2, 3, 4)], [], "lses has 0"),
            ([torch.zeros(1, 2, 3, 4)] * 2, [torch.zeros(1, 2, 3), torch.zeros(1, 2, 5)], "part 1"),
        ],
    )
    def test_parts_that_do_not_match_are_refused(self, outs, lses, message):
        with pytest.raises(ValueError, match=message):
            merge_attention(outs, lses)


SDPA_CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "bool mask": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4},
    "bool mask of keys": {"attn_mask": torch.tensor([[True, False, True, True, True, False, True]])},
    "bool mask a head": {"attn_mask": torch.rand(4, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.4},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(2))},
    "float mask with -inf": {"attn_mask": torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(1).bool(), -torch.inf)},
    "row without keys": {"attn_mask": torch.ones(5, 7).tril(-1).bool()},
}


class TestScaledDotProductAttention:
    @pytest.mark.parametrize("name", SDPA_CALLS)
    @pytest.mark.parametrize("lead", [(2, 4), (4,), (3, 2, 4)])
    def test_equals_pytorch(self, name, lead):
        if name == "float mask" and len(lead) == 1:
            pytest.skip("a 4-D mask does not broadcast to 3-D operands")
        draw = torch.Generator().manual_seed(7)
        q, k, v = (torch.randn(*lead, *tail, generator=draw).requires_grad_() for tail in ((5, 8), (7, 8), (7, 6)))
        ours = scaled_dot_product_attention(q, k, v, **SDPA_CALLS[name])
        theirs = F.scaled_dot_product_attention(q, k, v, **SDPA_CALLS[name])
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours.square().sum(), (q, k, v)), torch.autograd.grad(theirs.square().sum(), (q, k, v)), atol=1e-5, rtol=1e-4
        )

    def test_batch_and_heads_broadcast(self):
        q, k, v = torch.randn(2, 4, 5, 8), torch.randn(1, 4, 7, 8), torch.randn(2, 1, 7, 6)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))

    def test_two_dimensions(self):
        q, k = torch.randn(5, 8), torch.randn(7, 8)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, k), F.scaled_dot_product_attention(q, k, k))

    def test_gqa(self):
        q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, k, enable_gqa=True), F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        )
        with pytest.raises(RuntimeError):
            scaled_dot_product_attention(q, k, k)

    @pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
    def test_causal_bias_objects(self, variant):
        q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
        bias = variant(5, 7)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, k, attn_mask=bias), F.scaled_dot_product_attention(q, k, k, attn_mask=bias)
        )

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda q, f: f(q, q.double(), q), "same dtype"),
            (lambda q, f: f(q[0, 0, 0], q, q), "at least 2 dimensional|at  least 2 dimensional"),
            (lambda q, f: f(q, q, q, attn_mask=torch.ones(5, 5).int()), "attn_mask dtype"),
            (lambda q, f: f(q, q, q, dropout_p=2.0), "dropout"),
            (lambda q, f: f(q, q[:, :3], q[:, :3], enable_gqa=True), "heads"),
        ],
    )
    def test_raises_where_pytorch_does(self, call, message):
        q = torch.randn(2, 4, 5, 8)
        with pytest.raises(RuntimeError):
            call(q, F.scaled_dot_product_attention)
        with pytest.raises(RuntimeError, match=message):
            call(q, scaled_dot_product_attention)

    def test_a_mask_together_with_is_causal_is_refused(self):
        q = torch.randn(2, 4, 5, 8)
        with pytest.raises(RuntimeError, match="is_causal"):
            scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5).bool(), is_causal=True)

    def test_keys_and_values_of_unlike_length_are_refused(self):
        """PyTorch's CPU kernel reads past the end of v here."""
        q = torch.randn(2, 4, 5, 8)
        with pytest.raises(RuntimeError, match="k has shape"):
            scaled_dot_product_attention(q, q, q[:, :, :4])


class TestPacked:
    LENGTHS = ((3, 5), (0, 2), (4, 4), (2, 0))

    def packed(self):
        draw = torch.Generator().manual_seed(8)
        total_q, total_k = (sum(lengths) for lengths in zip(*self.LENGTHS, strict=True))
        q, k, v = (
            torch.randn(total + 2, heads, dim, generator=draw, dtype=torch.float64).requires_grad_()
            for total, heads, dim in ((total_q, 4, 3), (total_k, 2, 3), (total_k, 2, 6))
        )
        cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*self.LENGTHS, strict=True))
        return q, k, v, cu_q, cu_k

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    @pytest.mark.parametrize(
        "options", [{}, {"causal": True}, {"window": (1, 1), "softcap": 2.0}, {"dropout_p": 0.4, "dropout_seed": SEED}]
    )
    def test_each_member_is_attention_alone(self, backend, options):
        q, k, v, cu_q, cu_k = self.packed()
        out, lse = attention_varlen_with_lse(q, k, v, cu_q, cu_k, backend=backend, **options)
        for member, (lq, lk) in enumerate(self.LENGTHS):
            rows, cols = slice(int(cu_q[member]), int(cu_q[member]) + lq), slice(int(cu_k[member]), int(cu_k[member]) + lk)
            # Dropout counts members as batch: the same member of a batch sees the same mask.
            alone = [x[part].transpose(0, 1)[None].expand(member + 1, -1, -1, -1) for x, part in ((q, rows), (k, cols), (v, cols))]
            expected = attention_with_lse(*alone, backend="reference", **options)
            torch.testing.assert_close(out[rows].transpose(0, 1), expected.out[member])
            torch.testing.assert_close(lse[:, rows], expected.lse[member])

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_rows_past_the_last_member_are_zero_with_zero_gradient(self, backend):
        q, k, v, cu_q, cu_k = self.packed()
        out = attention_varlen(q, k, v, cu_q, cu_k, backend=backend)
        assert torch.equal(out[-2:], torch.zeros_like(out[-2:]))
        for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert torch.equal(gradient[-2:], torch.zeros_like(gradient[-2:]))

    @pytest.mark.parametrize("hostile", [[0, 100, 3, -7, 2], [5, 4, 3, 2, 1], [-(2**40), 2**40, 0, 0, 9], [9, 9, 9, 9, 9]])
    def test_hostile_cu_seqlens_are_survived(self, hostile):
        q, k, v, *_ = self.packed()
        out = attention_varlen(q, k, v, torch.tensor(hostile), backend="torch")
        out.sum().backward()
        assert out.shape == (q.shape[0], 4, 6)

    def test_no_members(self):
        q, k, v, *_ = self.packed()
        assert torch.equal(attention_varlen(q, k, v, torch.tensor([0])), torch.zeros(q.shape[0], 4, 6, dtype=torch.float64))

    @pytest.mark.parametrize("name", ["mask", "bias"])
    def test_mask_and_bias_are_refused_with_the_reason(self, name):
        q, k, v, cu_q, cu_k = self.packed()
        with pytest.raises(TypeError, match=f"{name} does not apply to packed sequences"):
            attention_varlen(q, k, v, cu_q, cu_k, **{name: torch.ones(3, 3)})


def test_jagged_nested_tensors_go_in_and_come_out():
    draw = torch.Generator().manual_seed(9)
    members = [torch.randn(length, 4, 8, generator=draw) for length in (3, 5, 1)]
    nested = torch.nested.nested_tensor(members, layout=torch.jagged).requires_grad_()
    x = nested.transpose(1, 2)
    out = attention(x, x, x, causal=True)
    assert out.is_nested
    assert out.shape[:2] == (3, 4)
    for found, member in zip(out.transpose(1, 2).unbind(), members, strict=True):
        alone = member.transpose(0, 1)[None]
        torch.testing.assert_close(found.transpose(0, 1)[None], attention(alone, alone, alone, causal=True, backend="reference"))
    out.values().sum().backward()
    assert nested.grad is not None
    with pytest.raises(TypeError, match="jagged"):
        attention(x, members[0], members[0])


class TestAutocast:
    def test_operands_are_cast_to_its_dtype(self):
        q, k, v = operands(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = attention(q, k.bfloat16(), v.half(), causal=True)
        alone = attention(q.bfloat16(), k.bfloat16(), v.half().bfloat16(), causal=True)
        assert mixed.dtype is torch.bfloat16
        torch.testing.assert_close(mixed, alone, rtol=0, atol=0)

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_accumulation_keeps_its_precision(self, backend):
        """Under autocast a plain matmul inside would round the scores to bfloat16."""
        q, k, v = (x.detach() for x in operands(dtype=torch.bfloat16, head_dim=64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lse = attention_with_lse(q * 8, k * 8, v, causal=True, backend=backend).lse
        exact = attention_with_lse(q.double() * 8, k.double() * 8, v.double(), causal=True, backend="reference").lse
        torch.testing.assert_close(lse, exact.float(), rtol=1e-5, atol=1e-4)

    def test_gradients_arrive_in_the_inputs_dtype(self):
        q, k, v = operands(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attention(q, k, v).sum().backward()
        assert q.grad.dtype is torch.float32


class TestChoice:
    def test_backends_are_on_or_say_why_not(self):
        found = fused_attention.backends()
        assert list(found) == ["triton", "cuda", "cpu", "torch", "reference"]
        assert found["torch"] is None
        assert found["reference"] is None
        assert all(reason is None or len(reason) > 20 for reason in found.values())

    def test_explain_names_the_backend_and_a_reason_for_the_others(self):
        q, k, v = operands(dtype=torch.bfloat16)
        explanation = explain(q, k, v, causal=True, softcap=2.0)
        assert explanation.backend == "torch"
        assert explanation.reasons["torch"] is None
        assert explanation.reasons["triton"] is not None
        assert str(explanation).splitlines()[0] == "backend: torch"
        assert explanation.reasons["triton"] in str(explanation)

    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_a_demanded_backend_raises_its_reason(self, backend):
        q, k, v = operands(dtype=torch.float32)
        with pytest.raises(
            NotImplementedError, match=f"backend='{backend}' can't run this call: .*{fused_attention.backends()[backend][:30]}"
        ):
            attention(q, k, v, backend=backend)

    def test_an_unknown_backend_lists_the_known_ones(self):
        q, k, v = operands(dtype=torch.float32)
        with pytest.raises(ValueError, match="backend is 'flash', expected one of 'triton', 'cuda', 'cpu', 'torch', 'reference'"):
            attention(q, k, v, backend="flash")


class TestDropout:
    def test_a_seed_decides_everything(self):
        q, k, v = operands()
        first, again = (attention(q, k, v, dropout_p=0.5, dropout_seed=SEED) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, attention(q, k, v, dropout_p=0.5, dropout_seed=SEED + 1))

    def test_without_a_seed_the_default_generator_decides(self):
        q, k, v = operands()
        torch.manual_seed(1)
        first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(1)
        assert torch.equal(first, attention(q, k, v, dropout_p=0.5))
        assert not torch.equal(first, second)

    def test_all_dropped_is_zero_with_zero_gradient(self):
        q, k, v = operands()
        out = attention(q, k, v, dropout_p=1.0)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))
