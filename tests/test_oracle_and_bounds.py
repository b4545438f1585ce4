"""The judge is judged: the oracle against values worked out by hand, loops and finite differences; the bounds against planted errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_attention.testing import CASES, Arithmetic, Case, Inputs, check, measure, oracle, row_statistics, tier1
from fused_attention.testing.oracle import Call, philox

WORD = 0xFFFFFFFF
SMALL = [case for case in CASES if case.seqlen_q * case.seqlen_k <= 1000]
EVERYTHING = next(case for case in CASES if case.name == "everything")
PACKED_EVERYTHING = next(case for case in CASES if case.name == "packed-everything")


def one_head(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 on Python integers, which never wrap."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second // 2**32) ^ b ^ left, second % 2**32, (first // 2**32) ^ d ^ right, first % 2**32
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox_by_hand(counter, key) == words
    assert tuple(int(word) for word in philox(tuple(torch.tensor([c]) for c in counter), key)) == words


def test_philox_on_tensors_is_philox_on_integers():
    counters = torch.randint(0, 2**32, (4, 200), generator=torch.Generator().manual_seed(1))
    key = (0x89ABCDEF, 0xFEDCBA98)
    words = torch.stack(philox(tuple(counters), key))
    for column in range(200):
        assert tuple(words[:, column].tolist()) == philox_by_hand(tuple(counters[:, column].tolist()), key)


@pytest.mark.parametrize("name", ["dropout", "packed-dropout"])
def test_dropout_follows_its_counter(name):
    case = next(case for case in CASES if case.name == name)
    inputs = case.make()
    call, p = inputs.truth().call, case.dropout_p
    seed, offset = inputs.options["dropout_seed"].tolist()
    for member in range(call.batch):
        for head in range(call.heads):
            rows, columns = call.queries(call.q, member).shape[1], call.keys(call.k, member).shape[1]
            factor = call.dropout(member, head, rows, columns)
            for i in range(rows):
                for j in range(columns):
                    words = philox_by_hand((j // 4, i, member * case.heads + head, offset % 2**32), (seed % 2**32, seed // 2**32))
                    assert factor[i, j] == (1 / (1 - p) if words[j % 4] >= math.floor(p * 2**32) else 0.0)


def visible_by_loop(call: Call, member: int, head: int, rows: int, columns: int) -> Tensor:
    """One pair after the other, as the documentation says it."""
    start, end = 0, columns
    if call.kv_lengths is not None:
        length = call.kv_lengths[member].tolist()
        start, end = (max(0, min(columns, x)) for x in (length if isinstance(length, list) else (0, length)))
    offset = end - rows if call.offset is None else call.offset if isinstance(call.offset, int) else call.offset[member].item()
    result = torch.zeros(rows, columns, dtype=torch.bool)
    for i in range(rows):
        for j in range(columns):
            sees = start <= j < end
            if call.left is not None and j < i + offset - call.left:
                sees = False
            if call.right is not None and j > i + offset + call.right:
                sees = False
            for tensor, hides in ((call.mask, lambda x: not x), (call.bias, lambda x: x == -math.inf)):
                if tensor is not None:
                    four = tensor[None, None] if tensor.dim() == 2 else tensor
                    index = tuple(at if size > 1 else 0 for at, size in zip((member, head, i, j), four.shape, strict=True))
                    if hides(four[index].item()):
                        sees = False
            result[i, j] = sees
    return result


@pytest.mark.parametrize("case", SMALL[::2] + [EVERYTHING, PACKED_EVERYTHING], ids=lambda case: case.name)
def test_visibility_is_the_loop(case):
    call = case.make().truth(backward=False).call
    for member in range(call.batch):
        for head in range(0, call.heads, 2):
            rows, columns = call.queries(call.q, member).shape[1], call.keys(call.k, member).shape[1]
            assert torch.equal(call.visible(member, head, rows, columns), visible_by_loop(call, member, head, rows, columns))


def test_two_keys_by_hand():
    """Scores 0 and log 3 weigh 1/4 and 3/4."""
    truth = oracle(one_head([1.0]), one_head([0.0], [math.log(3.0)]), one_head([8.0], [4.0]), scale=1.0)
    assert truth.out.item() == pytest.approx(5.0, rel=1e-15)
    assert truth.lse.item() == pytest.approx(math.log(4.0), rel=1e-15)


def test_causal_by_hand():
    """Of two queries and three keys, the last query sees all, the first all but the last."""
    q, k, v = one_head([0.0], [0.0]), one_head([1.0], [2.0], [3.0]), one_head([1.0], [3.0], [8.0])
    truth = oracle(q, k, v, causal=True)
    torch.testing.assert_close(truth.out[0, 0, :, 0], torch.tensor([2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(truth.lse[0, 0], torch.tensor([2.0, 3.0], dtype=torch.float64).log())
    top_left = oracle(q, k, v, causal=True, offset=0)
    torch.testing.assert_close(top_left.out[0, 0, :, 0], torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_softcap_alibi_bias_and_sink_by_hand():
    """The order is softcap, then alibi and bias, then the softmax beside the sink."""
    q, k, v = one_head([2.0]), one_head([1.0], [-1.0]), one_head([1.0], [10.0])
    bias, slopes, sinks = one_head([0.5, -0.25]), torch.tensor([0.125]), torch.tensor([0.75])
    truth = oracle(q, k, v, scale=1.0, softcap=3.0, bias=bias, alibi_slopes=slopes, sinks=sinks)
    first = 3.0 * math.tanh(2.0 / 3.0) - 0.125 * 1 + 0.5  # the query stands at the last key
    second = 3.0 * math.tanh(-2.0 / 3.0) - 0.0 - 0.25
    total = math.exp(first) + math.exp(second) + math.exp(0.75)
    assert truth.out.item() == pytest.approx((math.exp(first) + 10 * math.exp(second)) / total, rel=1e-14)
    assert truth.lse.item() == pytest.approx(math.log(total), rel=1e-14)


def test_rows_that_see_nothing_by_definition():
    inputs = next(case for case in CASES if case.name == "no-visible-keys-sinks").make()
    truth = inputs.truth()
    assert torch.equal(truth.out[0], torch.zeros_like(truth.out[0]))
    assert torch.equal(truth.lse[0], inputs.options["sinks"].double()[:, None].expand_as(truth.lse[0]))
    assert torch.equal(truth.values["dk"][0], torch.zeros_like(truth.values["dk"][0]))
    without = inputs.changed(options={"sinks": None}).truth()
    assert torch.equal(without.lse[0], torch.full_like(without.lse[0], -math.inf))
    assert torch.equal(without.values["dq"][0], torch.zeros_like(without.values["dq"][0]))


def test_grouped_heads_are_repeated_heads():
    inputs = Case("grouped", heads=6, kv_heads=2, causal=True).make(dtype=torch.float64)
    repeated = inputs.changed(k=inputs.k.repeat_interleave(3, dim=1), v=inputs.v.repeat_interleave(3, dim=1)).truth()
    truth = inputs.truth()
    torch.testing.assert_close(truth.out, repeated.out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(truth.values["dk"], repeated.values["dk"].unflatten(1, (2, 3)).sum(2), rtol=1e-13, atol=1e-13)


def test_packed_members_are_calls_of_their_own():
    case = PACKED_EVERYTHING
    inputs = replace(case, dropout_p=0.0).make(dtype=torch.float64)
    truth, options = inputs.truth(), inputs.options
    starts_q, starts_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    for member in range(case.members):
        rows, columns = slice(*starts_q[member : member + 2]), slice(*starts_k[member : member + 2])
        own = {name: options[name] for name in ("causal", "window", "softcap", "scale", "sinks")}
        own |= {name: options[name][member : member + 1] for name in ("offset", "kv_lengths", "alibi_slopes")}
        alone = oracle(*(x.transpose(0, 1)[None] for x in (inputs.q[rows], inputs.k[columns], inputs.v[columns])), **own)
        torch.testing.assert_close(alone.out[0].transpose(0, 1), truth.out[rows], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(alone.lse[0], truth.lse[:, rows], rtol=1e-14, atol=1e-14)
    unused = slice(starts_q[-1], None)
    assert not truth.out[unused].any()
    assert not truth.values["dq"][unused].any()


def loss(inputs: Inputs) -> Tensor:
    truth = inputs.truth(backward=False)
    seen = truth.lse > -math.inf
    return (truth.out * inputs.dout).sum() + (truth.lse[seen] * inputs.dlse[seen]).sum()


@pytest.mark.parametrize(
    "name", ["base", "everything", "packed-everything", "gpt-oss", "alibi-bias-cap-sinks", "first-rows-empty", "bias-1h11"]
)
def test_gradients_are_finite_differences(name):
    inputs = next(case for case in CASES if case.name == name).make(dtype=torch.float64)
    truth, step = inputs.truth(), 1e-6
    generator = torch.Generator().manual_seed(3)
    for name in ("q", "k", "v", "bias", "alibi_slopes", "sinks"):
        tensor = inputs.options.get(name, getattr(inputs, name, None))
        if tensor is None:
            continue
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

        def moved(amount: float, name: str = name, tensor: Tensor = tensor, direction: Tensor = direction) -> Inputs:
            value = tensor + amount * direction
            return inputs.changed(**{name: value}) if name in ("q", "k", "v") else inputs.changed(options={name: value})

        slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
        expected = (truth.values[f"d{name}"] * direction).sum()
        assert slope.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7), name


def float32_kernel(inputs: Inputs) -> dict[str, Tensor]:
    """The definition in the input's own type, whole tensors at once: what a plain correct implementation returns."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT) * q.shape[-1] ** -0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~visible, -math.inf)
    out, lse = scores.softmax(-1) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


PLAIN = Case("plain", heads=6, kv_heads=2, seqlen_q=29, seqlen_k=67, head_dim=16, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 30.0])
def test_a_correct_implementation_is_inside(dtype, magnitude):
    inputs = replace(PLAIN, magnitude=magnitude).make(dtype=dtype)
    report = check(float32_kernel(inputs), inputs.truth())
    assert 0.0 < report.used < 0.9


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_an_error_of_one_element_is_outside(name):
    inputs = PLAIN.make()
    output, truth = float32_kernel(inputs), inputs.truth()
    position = (1, 1, 20, 3)[: output[name].dim()]
    for factor in (-3.0, 3.0):
        wrong = output[name].clone()
        wrong[position] += factor * tier1(truth)[name][position]
        with pytest.raises(AssertionError, match=rf"{name} uses .* of its bound|{name} uses .* times its bound"):
            check(output | {name: wrong}, truth)
    wrong = output[name].clone()
    wrong[position] = math.nan
    with pytest.raises(AssertionError, match=f"{name} uses inf times its bound"):
        check(output | {name: wrong}, truth)


@pytest.mark.parametrize("case", [case for case in SMALL if case.magnitude == 1.0], ids=lambda case: case.name)
def test_bounds_are_tight(case):
    """A bound is a small share of what it bounds: in float32 3e-4 of out and lse, 3e-3 of a gradient, of narrow types 60 roundoffs."""
    truth = case.make().truth()
    unit = Arithmetic.of(truth.dtypes["out"], truth.call.q.device).stored
    for name, bound in tier1(truth).items():
        single = 3e-4 if name in ("out", "lse") else 3e-3
        allowed = {torch.float64: 1e-12, torch.float32: single}.get(truth.dtypes["out"], 60 * unit)
        value = truth.values[name]
        largest = value[value.abs() < math.inf].abs().max().item() if (value.abs() < math.inf).any() else 0.0
        assert bound.isfinite().all(), name
        assert (bound.max().item() if bound.numel() else 0.0) <= allowed * max(largest, 1.0), name


def test_rows_that_see_nothing_must_be_exact():
    inputs = next(case for case in CASES if case.name == "first-rows-empty").make()
    truth = inputs.truth()
    exact = {name: value.to(truth.dtypes[name]) for name, value in truth.values.items()}
    check(exact, truth)
    for name, value in (("out", 1e-30), ("lse", -1e30), ("dq", 1e-30)):
        wrong = exact[name].clone()
        wrong[0, 0, 0] = value
        with pytest.raises(AssertionError, match=r"inf times its bound"):
            check(exact | {name: wrong}, truth)


def test_other_shapes_types_and_names_are_refused():
    inputs = PLAIN.make()
    truth = inputs.truth(backward=False)
    out = truth.out.float()
    with pytest.raises(AssertionError, match=r"out is torch.float32 of shape \(2, 6, 67, 16\), expected .* \(2, 6, 29, 16\)"):
        check(torch.zeros(2, 6, 67, 16), truth)
    with pytest.raises(AssertionError, match=r"out is torch.float64"):
        check(truth.out, truth)
    with pytest.raises(AssertionError, match=r"the truth has no dq"):
        check({"out": out, "dq": inputs.q}, truth)
    with pytest.raises(AssertionError, match="lse is None"):
        check({"out": out, "lse": None}, truth)
    assert measure(out + 1.0, truth).used > 1.0


STATISTICAL = Case("statistical", batch=1, heads=4, seqlen_q=257, seqlen_k=257, head_dim=64, causal=True, dtype=torch.bfloat16)


def test_row_statistics_know_rounding_from_truncation_and_from_another_type():
    truth = STATISTICAL.make().truth(backward=False)
    rounded = row_statistics(truth.out.bfloat16(), truth)
    assert 0.35 <= rounded.median <= 0.5, str(rounded)
    assert rounded.largest < 1.0, str(rounded)
    assert abs(rounded.bias) < 5.0, str(rounded)
    bits = truth.out.float().view(torch.int32) & ~0xFFFF
    truncated = row_statistics(bits.view(torch.float32).bfloat16(), truth)
    assert truncated.bias < -50.0, str(truncated)
    noisy = row_statistics((truth.out * (1 + 2.0**-8 * torch.randn_like(truth.out))).bfloat16(), truth)
    assert noisy.median > 0.9, str(noisy)
