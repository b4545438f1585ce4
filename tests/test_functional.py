"""What the public functions promise beside their numbers: weights, autocast, the choice of a backend and its reasons, dropout's seed."""

import pytest
import torch

import fused_attention
from fused_attention import attention, attention_weights, attention_with_lse, backend, explain


def operands(*, batch=2, heads=4, kv_heads=2, seqlen_q=5, seqlen_k=7, head_dim=3, head_dim_v=6, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, seqlen_q, head_dim), (batch, kv_heads, seqlen_k, head_dim), (batch, kv_heads, seqlen_k, head_dim_v)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes)


def automatic():
    """What the automatic choice takes for CPU tensors on this machine."""
    return "torch" if fused_attention.backends()["cpu"] else "cpu"


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
        assert explanation.backend == automatic()
        assert explanation.reasons["torch"] is None
        assert explanation.reasons["triton"] is not None
        assert str(explanation).splitlines()[0] == f"backend: {automatic()}"
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


class TestWarmup:
    def test_it_runs_the_call_and_its_backward_and_leaves_no_trace(self, monkeypatch):
        q, k, v = operands(dtype=torch.float32)
        ran = []
        kernel = backend.KERNELS["torch"]
        for name in ("forward", "backward"):
            original = getattr(kernel, name)
            monkeypatch.setattr(type(kernel), name, lambda self, *args, name=name, original=original: ran.append(name) or original(*args))
        state = torch.get_rng_state()
        assert fused_attention.warmup(q, k, v, backend="torch", causal=True, dropout_p=0.5) == "torch"
        assert ran == ["forward", "backward"]
        assert q.grad is None
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_gradients_only_the_forward_runs(self, monkeypatch):
        q, k, v = (x.detach() for x in operands(dtype=torch.float32))
        monkeypatch.setattr(type(backend.KERNELS["torch"]), "backward", None)
        assert fused_attention.warmup(q, k, v, backend="torch") == "torch"

    def test_packed_sequences(self):
        q, k, v = (x.detach()[0].transpose(0, 1) for x in operands(dtype=torch.float32))
        cu_seqlens = torch.tensor([0, 2, q.shape[0]])
        assert fused_attention.warmup(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=torch.tensor([0, 1, k.shape[0]])) == automatic()

    def test_a_wrong_option_is_refused(self):
        q, k, v = operands(dtype=torch.float32)
        with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
            fused_attention.warmup(q, k, v, casual=True)
