"""A call like an earlier one skips checks and dispatch, and nothing that tells two calls apart, or listens to one, is missed."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import attention, attention_varlen, attention_with_lse, ops, plans
from fused_attention.backend import KERNELS
from fused_attention.listeners import unheard

TENSORS = {
    "mask": lambda: torch.rand(5, 7) < 0.7,
    "bias": lambda: torch.randn(2, 1, 5, 7),
    "kv_lengths": lambda: torch.tensor([3, 7]),
    "offset": lambda: torch.tensor([1, 2]),
    "alibi_slopes": lambda: torch.rand(4),
    "sinks": lambda: torch.randn(4),
}


class Counted(torch.Tensor):
    """A subclass, which __torch_function__ shows each call."""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(plans, "_remembered", {})


@pytest.fixture
def checks(monkeypatch):
    """One element for each call that was checked."""
    made = []
    check = plans.check
    monkeypatch.setattr(plans, "check", lambda *args, **options: made.append(options) or check(*args, **options))
    return made


def operands(batch=2, seqlen_q=5, dtype=torch.float32):
    return tuple(torch.randn(batch, heads, rows, 8, dtype=dtype) for heads, rows in ((4, seqlen_q), (2, 7), (2, 7)))


def test_the_same_facts_are_checked_once(checks):
    for _ in range(3):
        attention(*operands(), causal=True, window=(3, None))
    assert len(checks) == 1


@pytest.mark.parametrize("name", TENSORS)
def test_a_remembered_call_uses_the_tensor_that_it_is_given(name, checks):
    q, k, v = operands()
    options = [{name: make()} for make in [TENSORS[name]] * 2]
    results = [attention(q, k, v, backend="reference", **option) for option in options]
    assert len(checks) == 1
    plans._remembered.clear()
    torch.testing.assert_close(results[1], attention(q, k, v, backend="reference", **options[1]), rtol=0, atol=0)


SHARED = (("kv_lengths", "offset"), ("alibi_slopes", "sinks"))


@pytest.mark.parametrize("names", SHARED, ids="-".join)
def test_one_tensor_for_two_options_is_two_options(names, checks):
    """It was found by identity, so that the next call, with two tensors, got the first one for both."""
    q, k, v = operands()
    first, second = (TENSORS[names[0]]() for _ in range(2))
    second = second - 1
    attention(q, k, v, backend="reference", **dict.fromkeys(names, first))
    got = attention(q, k, v, backend="reference", **dict(zip(names, (first, second), strict=True)))
    assert len(checks) == 1
    plans.forget()
    torch.testing.assert_close(
        got, attention(q, k, v, backend="reference", **dict(zip(names, (first, second), strict=True))), rtol=0, atol=0
    )


def test_packed_queries_and_keys_may_share_their_lengths():
    q = torch.randn(12, 2, 8)
    same, other = torch.tensor([0, 5, 12]), torch.tensor([0, 1, 12])
    attention_varlen(q, q, q, same, same, backend="reference")
    got = attention_varlen(q, q, q, same, other, backend="reference")
    plans.forget()
    torch.testing.assert_close(got, attention_varlen(q, q, q, same, other, backend="reference"), rtol=0, atol=0)


def test_packed_keys_default_to_those_of_the_queries(checks):
    q = torch.randn(12, 2, 8)
    for lengths in ([0, 5, 12], [0, 1, 12]):
        cu_seqlens = torch.tensor(lengths)
        expected = attention_varlen(q, q, q, cu_seqlens, cu_seqlens.clone(), backend="reference")
        torch.testing.assert_close(attention_varlen(q, q, q, cu_seqlens, backend="reference"), expected, rtol=0, atol=0)
    assert len(checks) == 2


def changed(q, k, v):
    """Calls of which each differs from the plain one in a single fact."""
    yield (q[:, :, :3], k, v), {}
    yield (q.transpose(2, 3).contiguous().transpose(2, 3), k, v), {}
    yield tuple(x.double() for x in (q, k, v)), {}
    yield (q.clone().requires_grad_(), k, v), {}
    yield (q, k, v), {"causal": True}
    yield (q, k, v), {"scale": 0.5}
    yield (q, k, v), {"mask": torch.ones(5, 7, dtype=torch.bool)}
    yield (q, k, v), {"mask": torch.ones(1, 7, dtype=torch.bool).expand(5, 7)}
    yield (q, k, v), {"backend": "torch"}


def test_whatever_differs_is_checked(checks):
    q, k, v = operands()
    attention(q, k, v)
    for number, (tensors, options) in enumerate(changed(q, k, v), start=2):
        attention(*tensors, **options)
        assert len(checks) == number, options
    with torch.no_grad():
        attention(q.requires_grad_(), k, v)
    assert len(checks) == number + 1


def test_a_wrong_type_that_equals_a_right_one_is_still_refused():
    q, k, v = operands()
    attention(q, k, v, causal=True, softcap=1.0)
    with pytest.raises(TypeError, match="causal is 1"):
        attention(q, k, v, causal=1, softcap=1.0)
    with pytest.raises(ValueError, match="softcap is True"):
        attention(q, k, v, causal=True, softcap=True)
    attention(q, k, v, window=(1, 0))
    for window in ((1.0, 0), (True, 0)):
        with pytest.raises(TypeError, match="window left is"):
            attention(q, k, v, window=window)


def test_what_has_no_hash_is_checked_each_time(checks):
    for _ in range(2):
        attention(*operands(), window=[3, 0])
    assert len(checks) == 2


def test_a_wrong_call_is_refused_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="window left is -1"):
            attention(*operands(), window=(-1, 0))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": -0.4}, {"dropout_p": 0.5}, {"offset": 1, "window": (2, 1)}], ids=str)
@pytest.mark.parametrize("head_dim_v", [8, 5])
def test_a_call_after_the_first_computes_what_a_first_one_would(options, head_dim_v):
    """Nothing of the call that was remembered stays in what the next one is given: addresses, a seed, the room for the results."""
    for number in range(3):
        q, k, _ = operands()
        v = torch.randn(2, 2, 7, head_dim_v)
        torch.manual_seed(number)
        got = attention_with_lse(q, k, v, **options)
        torch.manual_seed(number)
        torch.testing.assert_close(got, attention_with_lse(q, k, v, backend="reference", **options))


@pytest.mark.skipif(KERNELS["cpu"].unavailable() is not None, reason="the compiled module is missing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
def test_out_alone_is_the_same_and_makes_no_lse(dtype, seqlen_q, monkeypatch):
    q, k, v = operands(seqlen_q=seqlen_q, dtype=dtype)
    expected = attention_with_lse(q, k, v, backend="cpu", causal=True).out
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: made.append(args) or empty(*args, **options))
    got = attention(q, k, v, backend="cpu", causal=True)
    assert not made
    attention_with_lse(q, k, v, backend="cpu", causal=True)
    assert len(made) == 1
    assert torch.equal(got, expected)


@pytest.mark.parametrize("subclass", [False, True])
def test_no_tensor_is_kept_alive(subclass):
    mask = TENSORS["mask"]()
    mask = mask.as_subclass(Counted) if subclass else mask
    attention(*operands(), mask=mask)
    kept = weakref.ref(mask)
    del mask
    gc.collect()
    assert kept() is None


def test_there_are_never_more_than_so_many(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 3)
    for seqlen_q in range(1, 9):
        attention(*operands(seqlen_q=seqlen_q))
        assert len(plans._remembered) <= 3


def test_a_plain_call_goes_straight_to_the_kernel(monkeypatch):
    q, k, v = operands()
    expected = attention(q, k, v, mask=(mask := TENSORS["mask"]()))
    monkeypatch.setattr(ops, "forward_op", None)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            torch.testing.assert_close(attention(q, k, v, mask=mask), expected, rtol=0, atol=0)


def negated(x):
    """A view with the negative bit: its memory holds -x."""
    return torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], -1)).conj().imag


def test_whoever_listens_still_hears_the_operator(monkeypatch):
    """Modes, tracers, transforms, the profiler, and tensors that are more than their memory."""
    q, k, v = operands()
    problem = plans.plan(q, k, v, {}, None).problem
    assert unheard(q, k, v, *problem)
    heard = []
    contexts = (FlopCounterMode(display=False), TorchFunctionMode(), torch.device("cpu"), torch.profiler.profile(), mock.MagicMock())
    for context in contexts:
        with context:
            heard.append(not unheard(q, k, v, *problem))
    assert heard == [True] * 4 + [False]
    for x in (negated(q), torch._efficientzerotensor(q.shape), q.as_subclass(Counted)):
        assert not unheard(x, k, v, *problem), type(x)
        assert not unheard(q, k, x, *problem), type(x)
    assert not unheard(q, k, v, *problem._replace(bias=negated(torch.randn(5, 7))))
    for transform in (torch.vmap, torch.func.grad):
        transform(lambda x: heard.append(not unheard(x, k, v, *problem)) or x.sum())(q)
    torch.jit.trace(lambda x: heard.append(not unheard(x, k, v, *problem)) or x, (q,), check_trace=False)
    assert heard[5:] == [True] * 3


def test_a_negative_view_is_read_for_what_it_says():
    q, k, v = operands()
    torch.testing.assert_close(attention(negated(q), k, negated(v)), attention(q, k, v), rtol=0, atol=0)
