"""Corners where a result was once wrong or a call once crashed: each says which."""

import pytest
import torch

from fused_attention import attention, attention_varlen, attention_weights, attention_with_lse, backends, blockwise, explain

RUNNABLE = [name for name, reason in backends().items() if reason is None]


def operands(*, dtype=torch.float32, heads=2, seqlen_q=5, seqlen_k=7, head_dim=8):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, heads, seqlen_q, head_dim), (2, heads, seqlen_k, head_dim), (2, heads, seqlen_k, head_dim)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def jagged(*lengths, heads=2, head_dim=8):
    members = [torch.randn(length, heads, head_dim) for length in lengths]
    return torch.nested.nested_tensor(members, layout=torch.jagged)


class TestNested:
    def test_keys_and_values_of_unlike_lengths_are_refused(self):
        """Their rows were paired as they came, without an error."""
        q, k, v = (x.transpose(1, 2) for x in (jagged(3, 5), jagged(3, 5), jagged(5, 3)))
        with pytest.raises(ValueError, match="k and v are jagged in unlike ways"):
            attention(q, k, v)

    def test_a_forgotten_transpose_is_refused(self):
        x = jagged(3, 5)
        with pytest.raises(ValueError, match=r"q is ragged in dimension 1, expected 2"):
            attention(x, x, x)

    def test_holes_between_members_are_refused(self):
        """lengths() was ignored: the rows in the holes took part."""
        values, offsets = torch.randn(8, 2, 8), torch.tensor([0, 4, 8])
        holes = torch.nested.nested_tensor_from_jagged(values, offsets, lengths=torch.tensor([3, 2])).transpose(1, 2)
        with pytest.raises(ValueError, match="q has holes between its members"):
            attention(holes, holes, holes)

    def test_queries_may_be_jagged_in_another_way_than_keys(self):
        q, kv = jagged(2, 4), jagged(3, 5)
        k = kv.transpose(1, 2)
        out = attention(q.transpose(1, 2), k, k).transpose(1, 2)
        for found, rows, keys in zip(out.unbind(), q.unbind(), kv.unbind(), strict=True):
            alone = [x.transpose(0, 1)[None] for x in (rows, keys, keys)]
            torch.testing.assert_close(found.transpose(0, 1)[None], attention(*alone, backend="reference"))

    def test_explain_speaks_of_the_packed_call_that_runs(self):
        x = jagged(3, 5).transpose(1, 2)
        assert explain(x, x, x).backend == ("cpu" if "cpu" in RUNNABLE else "torch")

    def test_other_functions_say_that_they_take_none(self):
        x = jagged(3, 5).transpose(1, 2)
        with pytest.raises(TypeError, match="q is a nested tensor, expected a strided one"):
            attention_with_lse(x, x, x)


class TestWeights:
    @pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float32).min])
    def test_rows_sum_to_one_whatever_their_lse(self, hidden):
        """exp(scores - lse) has no digits left where lse is huge: a row that a finite bias hides had weights of 1 each."""
        q, k, v = operands()
        bias = torch.zeros(5, 7)
        bias[2] = hidden
        out, lse = attention_with_lse(q, k, v, bias=bias, backend="reference")
        weights = attention_weights(q, k, lse, bias=bias)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
        torch.testing.assert_close(out, attention(q, k, v, bias=bias, backend="torch"))

    def test_a_larger_lse_scales_them(self):
        """Part of the keys against the lse of all of them."""
        q, k, v = operands()
        lse = attention_with_lse(q, k, v).lse
        whole = attention_weights(q, k, lse)
        torch.testing.assert_close(attention_weights(q, k[:, :, :3], lse), whole[..., :3])

    @pytest.mark.parametrize("lse", [None, [1.0], torch.zeros(2, 2, 5, dtype=torch.int64), torch.zeros(2, 2, 5, device="meta")])
    def test_an_lse_that_is_none_is_refused(self, lse):
        q, k, _ = operands()
        with pytest.raises(TypeError, match="lse is"):
            attention_weights(q, k, lse)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_wider_than_q(backend, dtype):
    """A float64 bias once met a float32 product of probabilities and v."""
    q, k, v = operands(dtype=dtype)
    bias = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    out = attention(q, k, v, bias=bias, backend=backend)
    exact = attention(q.double(), k.double(), v.double(), bias=bias, backend="reference")
    torch.testing.assert_close(out, exact.to(dtype), atol=2e-2, rtol=2e-2)
    assert torch.autograd.grad(out.sum(), bias)[0].dtype is torch.float64


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize(
    ("far", "near"),
    [
        ({"offset": 2**70}, {"offset": 10**6}),
        ({"offset": -(2**70)}, {"offset": -(10**6)}),
        ({"window": (2**70, 2**80)}, {"window": (10**6, 10**6)}),
        ({"causal": True, "offset": 2**70, "window": (2, None)}, {"causal": True, "offset": 10**6, "window": (2, None)}),
    ],
)
def test_numbers_past_int64_mean_far_away(backend, far, near):
    """The operator's schema refused them with a sentence about Optional[int]."""
    q, k, v = operands()
    assert torch.equal(attention(q, k, v, backend=backend, **far), attention(q, k, v, backend=backend, **near))


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [10**400, 1e300])
def test_numbers_that_no_float32_holds_are_refused(name, number):
    """10 ** 400 raised OverflowError, 1e300 gave nan."""
    q, k, v = operands()
    with pytest.raises(ValueError, match=f"{name} is "):
        attention(q, k, v, **{name: number})


def test_only_the_gradients_that_are_needed_are_made(monkeypatch):
    """blockwise computed all of them, and a float32 matrix for the gradient of a bias that needed none."""
    q, k, v = operands()
    found = []
    original = blockwise.tile_gradients
    monkeypatch.setattr(blockwise, "tile_gradients", lambda *args: found.append(original(*args)) or found[-1])
    bias = torch.randn(5, 7)
    torch.autograd.grad(attention(q, k.detach(), v.detach(), bias=bias, backend="torch").sum(), q)
    assert [name for name, share in found[0]._asdict().items() if share is not None] == ["q"]


def test_rows_before_the_first_member_belong_to_none():
    """They were taken for rows of the first member, at negative positions."""
    x = torch.randn(6, 2, 8)
    out = attention_varlen(x, x, x, torch.tensor([2, 4, 6]))
    assert torch.equal(out[:2], torch.zeros(2, 2, 8))
    torch.testing.assert_close(out[2:], attention_varlen(x[2:], x[2:], x[2:], torch.tensor([0, 2, 4])))


def test_packed_members_cost_what_they_see(monkeypatch):
    """Every tile of total x total was visited."""
    tiles = []
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    original = blockwise._key_blocks
    monkeypatch.setattr(blockwise, "_key_blocks", lambda *args: [tiles.append(1) or cols for cols in original(*args)])
    x = torch.randn(256, 2, 8)
    attention_varlen(x, x, x, torch.arange(0, 257, 16), backend="torch")
    assert len(tiles) == 16


def test_explain_refuses_what_attention_would():
    q, k, v = operands()
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'foo'"):
        explain(q, k, v, foo=1)
