"""Packed sequences and jagged nested tensors: each member is attention alone, and nothing is read or written past the last one."""

import pytest
import torch

from fused_attention import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse, backends

SEED = torch.tensor([11, 5])
PACKING = [name for name in ("triton", "torch", "reference") if backends()[name] is None]


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

    @pytest.mark.parametrize("backend", PACKING)
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

    @pytest.mark.parametrize("backend", PACKING)
    def test_rows_past_the_last_member_are_zero_with_zero_gradient(self, backend):
        q, k, v, cu_q, cu_k = self.packed()
        out = attention_varlen(q, k, v, cu_q, cu_k, backend=backend)
        assert torch.equal(out[-2:], torch.zeros_like(out[-2:]))
        for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert torch.equal(gradient[-2:], torch.zeros_like(gradient[-2:]))

    @pytest.mark.parametrize("hostile", [[0, 100, 3, -7, 2], [5, 4, 3, 2, 1], [-(2**40), 2**40, 0, 0, 9], [9, 9, 9, 9, 9]])
    @pytest.mark.parametrize("backend", PACKING)
    def test_hostile_cu_seqlens_are_survived(self, hostile, backend):
        q, k, v, *_ = self.packed()
        out = attention_varlen(q, k, v, torch.tensor(hostile), backend=backend)
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
