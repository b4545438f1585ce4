"""Values chosen to break attention: huge and tied scores, underflow, cancellation, infinities and NaN; forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import backends, blockwise
from fused_attention.testing import Case, Inputs, check

RUNNABLE = [name for name, reason in backends().items() if reason is None]
BASE = Case("adversarial", batch=1, heads=2, seqlen_q=35, seqlen_k=35, head_dim=16)
COLUMN = torch.arange(35.0)


@pytest.fixture(params=RUNNABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    return request.param


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    reason = inputs.explain().reasons[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return inputs.run(backend)


def scored(logits: Tensor) -> Inputs:
    """Every query sees the same logits, one for each key: q = (1, 0, ...), k = (logit, 0, ...), scale 1."""
    inputs = BASE.make()
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0], k[..., 0] = 1.0, logits
    return inputs.changed(q=q, k=k, options={"scale": 1.0})


def single(value: float, *places: int) -> Tensor:
    logits = torch.zeros(35)
    logits[list(places)] = value
    return logits


def half_ulp() -> Tensor:
    """Weights at the midpoint between two bfloat16 numbers, all but one key: their roundings add up instead of cancelling."""
    logits = torch.full((35,), math.log(0.5 * (1 + 2.0**-8)))
    logits[7] = 0.0
    return logits


SCORES: dict[str, Callable[[], Tensor]] = {
    "all-equal-1e4": lambda: torch.full((35,), 1e4),
    "all-equal-minus-1e4": lambda: torch.full((35,), -1e4),
    "all-equal-0": lambda: torch.zeros(35),
    "one-winner": lambda: single(1e4, 20),
    "first-wins": lambda: single(1e4, 0),
    "last-wins": lambda: single(1e4, 34),
    "one-loser": lambda: single(-1e4, 20),
    "two-way-tie": lambda: single(1e4, 3, 33),
    "repeated-maximum": lambda: single(5.0, 2, 17, 18, 34),
    "a-winner-in-each-tile": lambda: single(30.0, 5, 21, 34),
    "half-ulp-weights": half_ulp,
    "increasing": lambda: COLUMN * 7,
    "decreasing": lambda: COLUMN * -7,
    "slowly-increasing": lambda: COLUMN * 0.01 + 80.0,
    "lse-below-minus-88": lambda: COLUMN.sin() - 120.0,
    "lse-above-88": lambda: COLUMN.sin() + 120.0,
    "tails-underflow": lambda: -COLUMN * 4.0,
    "tails-denormal": lambda: -COLUMN * 3.0 - 2.0,
    "shift-6e4": lambda: COLUMN.cos() * 8 + 6e4,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name, causal, backend):
    inputs = scored(SCORES[name]()).changed(options={"causal": causal})
    output = run(inputs, backend)
    assert all(tensor.isfinite().all() for tensor in output.values())
    check(output, inputs.truth())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("level", [-120.0, 120.0])
def test_far_scores_at_every_remainder_of_a_tile(level, length, backend):
    """A padded key that counts as score 0 overflows in the backward pass where lse < -88.7 (pytorch#196678)."""
    inputs = scored(torch.full((35,), level))
    inputs = inputs.changed(k=inputs.k[:, :, :length], v=inputs.v[:, :, :length])
    check(run(inputs, backend), inputs.truth())


def alternating(tensor: Tensor) -> Tensor:
    powers = 2.0 ** (torch.arange(tensor.shape[2]) % 12)
    return ((-1.0) ** torch.arange(tensor.shape[2]) * powers)[:, None].expand_as(tensor).clone()


VALUES: dict[str, Callable[[Inputs], Inputs]] = {
    "values-one": lambda x: x.changed(v=torch.ones_like(x.v)),
    "values-constant": lambda x: x.changed(v=torch.full_like(x.v, 1e3)),
    "values-alternate": lambda x: x.changed(v=alternating(x.v)),
    "values-huge": lambda x: x.changed(v=x.v * 1e20),
    "values-tiny": lambda x: x.changed(v=x.v * 1e-30),
    "values-denormal": lambda x: x.changed(v=x.v * 1e-41),
    "keys-around-1000": lambda x: x.changed(k=x.k * 0.1 + 1e3),
    "keys-mean-over-spread": lambda x: x.changed(k=x.k * 1e-3 + 4.0),
    "queries-and-keys-denormal": lambda x: x.changed(q=x.q * 1e-41, k=x.k * 1e-41),
    "queries-huge-keys-tiny": lambda x: x.changed(q=x.q * 1e18, k=x.k * 1e-18),
    "gradients-huge": lambda x: x.changed(dout=x.dout * 1e15, dlse=x.dlse * 1e15),
    "gradients-tiny": lambda x: x.changed(dout=x.dout * 1e-20, dlse=x.dlse * 1e-20),
    "gradients-zero": lambda x: x.changed(dout=x.dout * 0, dlse=x.dlse * 0),
    "low-rank": lambda x: x.changed(q=x.q[:, :, :1].expand_as(x.q).clone(), k=x.k[:, :, :1].expand_as(x.k).clone(), v=-x.v.abs()),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_values(name, causal, backend):
    inputs = VALUES[name](BASE.make()).changed(options={"causal": causal})
    check(run(inputs, backend), inputs.truth())


def test_half_precision_near_its_largest_number(backend):
    inputs = BASE.make(dtype=torch.float16)
    inputs = inputs.changed(v=(inputs.v.sign() * 6e4).half(), dout=inputs.dout * 1e-3)
    output = run(inputs, backend)
    assert output["out"].isfinite().all()
    check(output, inputs.truth())


def test_tiles_that_a_row_does_not_see_come_first_between_and_last(backend):
    """-inf - -inf in a tile without a visible key must not reach a row that has others (pytorch#109517)."""
    mask = torch.zeros(1, 1, 35, 35, dtype=torch.bool)
    mask[..., 0:9, 33:] = True  # its first tiles are hidden
    mask[..., 9:18, :2] = True  # its last tiles
    mask[..., 18:27, [1, 34]] = True  # those between
    inputs = BASE.make().changed(options={"mask": mask})
    output = run(inputs, backend)
    assert all(output[name].isfinite().all() for name in output if name != "lse")
    check(output, inputs.truth())


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_broken_key_reaches_exactly_the_rows_that_see_it(where, filler, backend):
    """Key 20 is not finite: rows before it stay as they are, rows that see it become NaN or infinite, in every gradient's row as well."""
    inputs = BASE.make().changed(options={"causal": True})
    broken = getattr(inputs, where).clone()
    broken[:, :, 20] = filler
    output = run(inputs.changed(**{where: broken}), backend)
    dout, dlse = inputs.dout.clone(), inputs.dlse.clone()
    clean = inputs.changed(**{where: broken.masked_fill(~broken.isfinite(), 0.0)}, dout=dout, dlse=dlse)
    truth = clean.truth()
    before = slice(None, 20)
    untouched = {"out": output["out"].clone(), "lse": output["lse"].clone(), "dq": output["dq"].clone()}
    for name, tensor in untouched.items():
        tensor[:, :, 20:] = truth.values[name][:, :, 20:].to(tensor.dtype)
        assert tensor[:, :, before].isfinite().all()
    check(untouched, truth)
    if not (where == "k" and math.isinf(filler)):  # a key at infinity may score -inf, and then it is hidden
        assert not output["out"][:, :, 20:].isfinite().all(-1).any(), "a visible NaN was swallowed"


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_broken_key_reaches_no_gradient_of_keys_that_its_rows_do_not_see(where, backend):
    """exp(-inf - nan) is nan: of a row whose lse is nan, hidden keys once got a gradient, and not those of every tile."""
    if backend == "reference":
        pytest.skip("reference multiplies whole matrices, and 0 * nan is nan")
    inputs = BASE.make().changed(options={"window": (3, 0)})
    broken = getattr(inputs, where).clone()
    broken[:, :, 20] = math.nan
    output = run(inputs.changed(**{where: broken}), backend)
    truth = inputs.changed(**{where: broken.nan_to_num(0.0)}).truth()
    far = [*range(17), *range(24, 35)]  # rows 20 to 23 see it, and keys 17 to 23
    for name in ("dk", "dv"):
        output[name][:, :, 17:24] = truth.values[name][:, :, 17:24].to(output[name].dtype)
        assert output[name][:, :, far].isfinite().all()
    check({name: output[name] for name in ("dk", "dv")}, truth)


def test_no_weight_is_above_one_however_large_the_scores(backend):
    """Of lse at 1e10 the last place is 1024, and exp(score - lse) may be anything where nothing holds it."""
    inputs = scored(single(1e10, 20))
    q = inputs.q.clone()
    q[..., 0] = 1 + COLUMN.sin() / 3
    output = run(inputs.changed(q=q, dlse=None), backend)
    largest = inputs.dout.abs().sum(2, keepdim=True)
    assert (output["dv"].abs() <= largest * (1 + 1e-5)).all()
    assert all(tensor.isfinite().all() for tensor in output.values())


NEXT_TO: dict[str, dict[str, Any]] = {
    "nothing": {},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.3])},
    "key-bias": {"bias": COLUMN.sin()[None, None, None]},
    "dropout": {"dropout_p": 0.25, "dropout_seed": torch.tensor([3, 4])},
}


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("option", ["mask", "bias", "kv_lengths", "window"])
@pytest.mark.parametrize("other", NEXT_TO)
def test_a_hidden_key_may_hold_anything(other, option, filler, backend):
    if {other, option} == {"key-bias", "bias"}:
        pytest.skip("a call has one bias")
    hidden = torch.zeros(35, dtype=torch.bool)
    hidden[30:] = True
    options = {
        "mask": {"mask": ~hidden[None, None, None]},
        "bias": {"bias": torch.zeros(1, 1, 1, 35).masked_fill(hidden, -math.inf)},
        "kv_lengths": {"kv_lengths": torch.tensor([30]), "offset": 0},
        "window": {"window": (None, 0), "offset": -5},
    }[option]
    inputs = BASE.make().changed(options=options | NEXT_TO[other])
    filled = inputs.changed(k=inputs.k.masked_fill(hidden[:, None], filler), v=inputs.v.masked_fill(hidden[:, None], filler))
    check(run(filled, backend), inputs.truth())


def test_a_row_that_sees_nothing_gives_nothing_and_takes_nothing(backend):
    """Zeros, not NaN, and zeros as gradients, whatever comes back into such a row (pytorch#41508)."""
    inputs = BASE.make().changed(options={"causal": True, "offset": -9})
    q, dout, dlse = inputs.q.clone(), inputs.dout.clone(), inputs.dlse.clone()
    dlse[:, :, :9] = 1e30
    dout[:, :, :9] = 1e30
    output = run(inputs.changed(q=q, dout=dout, dlse=dlse), backend)
    for name in ("out", "dq"):
        assert not output[name][:, :, :9].any()
    assert torch.equal(output["lse"][:, :, :9], torch.full((1, 2, 9), -math.inf))
    check(output, inputs.truth())


@pytest.mark.parametrize("sink", [-1e4, -5.0, 30.0, 1e4])
def test_sinks_far_from_the_scores(sink, backend):
    inputs = BASE.make().changed(options={"sinks": torch.tensor([sink, 0.0]), "causal": True})
    check(run(inputs, backend), inputs.truth())


@pytest.mark.parametrize("value", [1e4, -1e4, 3e38])
def test_biases_far_from_the_scores(value, backend):
    inputs = BASE.make()
    bias = torch.zeros(1, 2, 35, 35)
    bias[..., ::3] = value
    inputs = inputs.changed(options={"bias": bias})
    output = run(inputs, backend)
    assert all(tensor.isfinite().all() for tensor in output.values())
    if abs(value) < 1e30:
        check(output, inputs.truth())


@pytest.mark.parametrize(
    "options", [{"softcap": 1e-40}, {"scale": 3e38}, {"sinks": torch.tensor([3e38, 0.0])}, {"sinks": torch.tensor([-3e38, 0.0])}], ids=str
)
def test_options_at_the_limits_of_float32(options, backend):
    """Scores of 0, which a factor that overflowed would make NaN."""
    if backend == "triton":
        pytest.skip("Triton's kernels multiply by log2(e) in float32, where factors within 1.45 times of its largest number overflow")
    inputs = BASE.make().changed(options=options)
    inputs = inputs.changed(q=torch.zeros_like(inputs.q))
    output = run(inputs, backend)
    assert all(output[name].isfinite().all() for name in ("out", "lse", "dv"))
    assert "dsinks" not in output or output["dsinks"].isfinite().all()
    check({"out": output["out"], "dv": output["dv"]}, inputs.truth())


@pytest.mark.parametrize("number", [2**31, 2**40, 2**62])
def test_windows_and_offsets_beyond_every_length(number, backend):
    inputs = BASE.make()
    everything = run(inputs, backend)
    for options in ({"window": (number, number)}, {"causal": True, "offset": number}):
        check(run(inputs.changed(options=options), backend), inputs.truth())
    nothing = run(inputs.changed(options={"causal": True, "offset": -number}), backend)
    assert not nothing["out"].any()
    assert (nothing["lse"] == -math.inf).all()
    assert everything["out"].any()
