"""merge_attention: parts of the keys join to the whole, batched and packed, and what does not fit together is refused."""

import itertools

import pytest
import torch

from fused_attention import attention_varlen_with_lse, attention_with_lse, merge_attention


def operands(*shapes):
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)


def assert_same(merged, whole, leaves):
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(
        torch.autograd.grad(merged.out.square().sum() + merged.lse.sin().sum(), leaves),
        torch.autograd.grad(whole.out.square().sum() + whole.lse.sin().sum(), leaves),
    )


class TestMerge:
    def parts(self, bounds):
        q, k, v = operands((2, 4, 5, 3), (2, 2, 11, 3), (2, 2, 11, 6))
        return (q, k, v), [attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], backend="torch") for a, b in itertools.pairwise(bounds)]

    @pytest.mark.parametrize("bounds", [(0, 11), (0, 4, 11), (0, 0, 4, 4, 9, 11), (0, 1, 2, 3, 11)])
    def test_parts_of_the_keys_join_to_the_whole(self, bounds):
        leaves, parts = self.parts(bounds)
        assert_same(merge_attention(*zip(*parts, strict=True)), attention_with_lse(*leaves, backend="reference"), leaves)

    def test_sinks_are_added_once(self):
        leaves, parts = self.parts((0, 3, 11))
        (sinks,) = operands((4,))
        merged = merge_attention(*zip(*parts, strict=True), sinks=sinks)
        assert_same(merged, attention_with_lse(*leaves, sinks=sinks, backend="reference"), (*leaves, sinks))

    @pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3)])
    def test_rows_that_no_part_saw(self, shape):
        lse = torch.full(shape, -torch.inf)
        out = torch.full((*shape, 4) if len(shape) == 3 else (3, 2, 4), torch.nan)
        merged = merge_attention([out, out], [lse, lse])
        assert torch.equal(merged.out, torch.zeros_like(out))
        assert torch.equal(merged.lse, lse)
        merged = merge_attention([out, out], [lse, lse], sinks=torch.tensor([1.0, 2.0]))
        assert torch.equal(merged.out, torch.zeros_like(out))
        assert torch.equal(merged.lse, torch.tensor([1.0, 2.0])[:, None].expand(shape))

    def test_chain_and_tree_agree(self):
        _, (a, b, c) = self.parts((0, 2, 7, 11))
        pair = merge_attention((a.out, b.out), (a.lse, b.lse))
        chain = merge_attention((pair.out, c.out), (pair.lse, c.lse))
        torch.testing.assert_close(chain, merge_attention(*zip(a, b, c, strict=True)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes_stay_what_they_were(self, dtype):
        _, parts = self.parts((0, 4, 11))
        outs = [part.out.to(dtype) for part in parts]
        lses = [part.lse.to(torch.promote_types(dtype, torch.float32)) for part in parts]
        merged = merge_attention(outs, lses)
        assert (merged.out.dtype, merged.lse.dtype) == (dtype, lses[0].dtype)
        exact = merge_attention([out.double() for out in outs], [lse.double() for lse in lses])
        # One rounding to the dtype, the last: the products and their sum are of the lses' dtype.
        torch.testing.assert_close(merged.out, exact.out.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


class TestPackedMerge:
    """Of (total, heads, head_dim_v) with lse (heads, total); 4 heads and a total of 4 is where a wrong reading goes unnoticed."""

    @pytest.mark.parametrize("lengths_q", [(3, 1), (3, 4), (0, 2)], ids=str)
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_parts_of_the_keys_join_to_the_whole(self, lengths_q, with_sinks):
        *leaves, sinks = operands((sum(lengths_q), 4, 3), (7, 2, 3), (7, 2, 6), (4,))
        q, k, v = leaves
        cu_q, cu_k = torch.tensor([0, *lengths_q]).cumsum(0), torch.tensor([0, 5, 7])
        halves = []
        for rows, lengths in ((slice(0, 2), (2, 0)), (slice(2, 7), (3, 2))):  # the first half has no key of the second member
            halves.append(attention_varlen_with_lse(q, k[rows], v[rows], cu_q, torch.tensor([0, *lengths]).cumsum(0), backend="torch"))
        given = {"sinks": sinks} if with_sinks else {}
        whole = attention_varlen_with_lse(q, k, v, cu_q, cu_k, backend="reference", **given)
        assert_same(merge_attention(*zip(*halves, strict=True), **given), whole, (*leaves, *given.values()))


OUT, LSE, PACKED, PACKED_LSE = (torch.zeros(shape) for shape in ((1, 2, 3, 4), (1, 2, 3), (3, 2, 4), (2, 3)))


@pytest.mark.parametrize(
    ("outs", "lses", "sinks", "message"),
    [
        ([], [], None, "outs has 0 parts"),
        ([OUT], [], None, "outs has 1 parts, lses has 0"),
        ([OUT] * 2, [LSE, LSE[..., :2]], None, r"part 1 has .* \(batch, heads, seqlen_q\) = \(1, 2, 3\)"),
        ([OUT, OUT[..., :3]], [LSE] * 2, None, r"part 1 has out \(1, 2, 3, 3\)"),
        ([PACKED], [PACKED_LSE.T], None, r"part 0 has out \(3, 2, 4\) and lse \(3, 2\), expected .* \(heads, total\) = \(2, 3\)"),
        ([OUT[None]], [LSE[None]], None, r"outs\[0\] has shape \(1, 1, 2, 3, 4\), expected .* or packed"),
        ([PACKED[0]], [PACKED_LSE[0]], None, r"outs\[0\] has shape \(2, 4\), expected .* or packed"),
        ([OUT], [LSE], torch.zeros(3), r"sinks has shape \(3,\), expected \(heads,\) = \(2,\)"),
        ([PACKED], [PACKED_LSE], torch.zeros(3), r"sinks has shape \(3,\), expected \(heads,\) = \(2,\)"),
        ([OUT], [LSE.to("meta")], None, "part 0 has out on cpu and lse on meta"),
        ([OUT], [LSE], torch.zeros(2, device="meta"), "sinks is on meta, outs on cpu"),
    ],
)
def test_parts_that_do_not_match_are_refused(outs, lses, sinks, message):
    with pytest.raises(ValueError, match=message):
        merge_attention(outs, lses, sinks=sinks)


@pytest.mark.parametrize(
    ("outs", "lses", "sinks", "message"),
    [
        (None, [LSE], None, "outs is a NoneType, expected a list or tuple of tensors"),
        (OUT, [LSE], None, "outs is a Tensor, expected a list or tuple of tensors"),
        ([OUT], "lse", None, "lses is a str, expected a list or tuple of tensors"),
        ([OUT], [[0.0]], None, r"lses\[0\] is a list, expected a torch.Tensor"),
        ([OUT, OUT.half()], [LSE] * 2, None, "outs has torch.float32, torch.float16, expected one floating dtype"),
        ([OUT.int()], [LSE], None, "outs has torch.int32, expected one floating dtype"),
        ([OUT] * 2, [LSE, LSE.double()], None, "lses has torch.float32, torch.float64, expected one floating dtype"),
        ([OUT], [LSE], [0.0, 0.0], "sinks is a list, expected a floating torch.Tensor"),
        ([OUT], [LSE], torch.zeros(2).int(), "sinks is torch.int32, expected a floating torch.Tensor"),
    ],
)
def test_what_is_no_tensor_or_of_mixed_dtypes_is_refused(outs, lses, sinks, message):
    with pytest.raises(TypeError, match=message):
        merge_attention(outs, lses, sinks=sinks)
