"""scaled_dot_product_attention beside PyTorch's: the same results and gradients, and the same refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fused_attention import scaled_dot_product_attention

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

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(("q_dims", "k_dims", "v_dims"), [(2, 2, 2), (3, 4, 4), (2, 4, 4), (4, 3, 3), (4, 2, 2), (4, 4, 2), (2, 3, 4)])
    def test_fewer_dimensions(self, is_causal, q_dims, k_dims, v_dims):
        lead = (2, 4)
        q, k, v = (torch.randn(*lead[4 - dims :], *tail) for dims, tail in ((q_dims, (5, 8)), (k_dims, (7, 8)), (v_dims, (7, 6))))
        ours = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal))

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

    @pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
    @pytest.mark.parametrize("sizes", [(3, 7), (5, 8), (5, 5), (9, 9)])
    def test_a_causal_bias_of_other_lengths_is_refused(self, variant, sizes):
        """PyTorch raises where it builds the mask; where it takes the bias for is_causal it ignores the sizes."""
        q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
        if variant is causal_lower_right and sizes[0] != sizes[1]:
            with pytest.raises(RuntimeError, match="size of tensor"):
                F.scaled_dot_product_attention(q, k, k, attn_mask=variant(*sizes))
        message = f"CausalBias for {sizes[0]} queries and {sizes[1]} keys, but query has 5 and key 7"
        with pytest.raises(RuntimeError, match=message):
            scaled_dot_product_attention(q, k, k, attn_mask=variant(*sizes))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("query", [1.0], "query is a list, expected a torch.Tensor"),
            ("key", "key", "key is a str, expected a torch.Tensor"),
            ("value", None, "value is a NoneType, expected a torch.Tensor"),
            ("attn_mask", [[True]], "attn_mask is a list, expected a torch.Tensor"),
            ("attn_mask", "causal", "attn_mask is a str, expected a torch.Tensor"),
            ("is_causal", 1, "is_causal is 1, expected True or False"),
            ("enable_gqa", "no", "enable_gqa is 'no', expected True or False"),
            ("dropout_p", "half", "dropout_p is 'half', expected a number"),
            ("dropout_p", None, "dropout_p is None, expected a number"),
            ("scale", "small", "scale is 'small', expected a number"),
        ],
    )
    def test_arguments_of_another_type_are_refused_as_pytorch_does(self, name, value, message):
        q = torch.randn(2, 4, 5, 8)
        call = {"query": q, "key": q, "value": q, name: value}
        with pytest.raises(TypeError, match=name):
            F.scaled_dot_product_attention(**call)
        with pytest.raises(TypeError, match=message):
            scaled_dot_product_attention(**call)

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
