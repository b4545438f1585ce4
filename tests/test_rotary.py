"""apply_rotary against a turn of complex numbers in float64, and its angles against each paper's formula, pair by pair."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from fused_attention import Rotary, apply_rotary
from fused_attention.rotary import LinearScaling, Llama3Scaling, NTKScaling, YarnScaling

BATCH, HEADS, SEQLEN, TABLE = 2, 3, 7, 50
SIZES = [(8, 4), (1, 0), (2, 1), (3, 1), (10, 2), (63, 31)]  # head_dim, pairs
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
POSITIONS = {
    "none": None,
    "an int": 41,
    "of each row": torch.tensor([4, 0, 49, 7, 7, 1, 30]),
    "of each member and row": torch.arange(14, dtype=torch.int32).view(2, 7),
    "outside the table": torch.tensor([-1, -(2**31), 50, 2**31 - 1, 2**40, 0, 49]),
}


def rows(head_dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """(batch, heads, seqlen, head_dim), as a projection leaves it: not contiguous."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, SEQLEN, HEADS, head_dim, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2)


def angles(pairs: int) -> Tensor:
    return torch.arange(TABLE, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(1, pairs + 1)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | int | None, interleaved: bool) -> Tensor:
    """The definition: each pair is a complex number, times cos + i sin of its position."""
    pairs = cos.shape[1]
    where = positions if isinstance(positions, Tensor) else torch.arange(SEQLEN) + (positions or 0)
    turn = torch.complex(cos.double(), sin.double())[where.expand(len(x), SEQLEN).long().clamp(0, TABLE - 1)][:, None]
    out = x.double().clone()
    for pair in range(pairs):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        number = torch.complex(x[..., a].double(), x[..., b].double()) * turn[..., pair]
        out[..., a], out[..., b] = number.real, number.imag
    return out


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_every_pair_turns_by_the_angle_of_its_position(positions, interleaved, dtype) -> None:
    for head_dim, pairs in SIZES:
        x, table = rows(head_dim, dtype), angles(pairs)
        cos, sin = (part if dtype is torch.float64 else part.float() for part in (table.cos(), table.sin()))
        got = apply_rotary(x, cos, sin, positions=positions, interleaved=interleaved)
        expected = turned(x, cos, sin, positions, interleaved)
        # Two products and their sum, each rounded as the arithmetic rounds; then once to the type of x. float64 is the oracle's own type.
        size = [turned(x.abs(), cos.abs(), sign * sin.abs(), positions, interleaved).abs() for sign in (1, -1)]
        arithmetic = 2.0**-24 if dtype is not torch.float64 else 2 * 2.0**-53
        bound = 2.01 * arithmetic * torch.maximum(*size) + ROUNDOFF[dtype] * expected.abs() + SMALLEST[dtype]
        assert got.dtype is dtype
        assert ((got.double() - expected).abs() <= bound).all()
        assert torch.equal(got[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_the_turn_back(positions, interleaved, dtype) -> None:
    x, dout = rows(10, dtype).requires_grad_(), rows(10, dtype, seed=1)
    cos, sin = angles(4).cos().to(dtype), angles(4).sin().to(dtype)
    (dx,) = torch.autograd.grad(apply_rotary(x, cos, sin, positions=positions, interleaved=interleaved), x, dout)
    assert torch.equal(dx, apply_rotary(dout, cos, -sin, positions=positions, interleaved=interleaved))
    torch.testing.assert_close(dx, turned(dout, cos, -sin, positions, interleaved).to(dtype))


def test_first_and_second_derivatives_of_everything() -> None:
    x = rows(5)[:, :1, :2].clone().requires_grad_()
    cos, sin = (part[:3].clone().requires_grad_() for part in (angles(2).cos(), angles(2).sin()))

    def call(*inputs: Tensor) -> Tensor:
        return apply_rotary(*inputs, positions=torch.tensor([2, 2]))

    assert torch.autograd.gradcheck(call, (x, cos, sin), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, cos, sin))


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_the_layout_and_the_input_stay(dtype) -> None:
    whole = rows(9, dtype)
    for x in (whole[..., :8], whole.contiguous(), whole[..., 1:], whole.mT.contiguous().mT):
        before = x.clone()
        out = apply_rotary(x, angles(4).cos().float(), angles(4).sin().float())
        assert out.stride() == torch.empty_like(x).stride()
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_stays_in_its_pair(dtype) -> None:
    x = rows(10, dtype)
    x[0, 0, 2, 1], x[0, 0, 3, 8] = math.nan, math.inf
    out = apply_rotary(x, angles(4).cos().to(dtype), angles(4).sin().to(dtype))
    finite = out.isfinite()
    expected = torch.ones_like(finite)
    expected[0, 0, 2, [1, 5]] = expected[0, 0, 3, 8] = False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved) -> None:
    rotary = Rotary(dim=6, interleaved=interleaved, scaling=YarnScaling(4.0, 16))
    tables = rotary.tables(40, 8, dtype=torch.float64)
    q, k = rows(8), rows(8, seed=1)
    scores = [
        apply_rotary(q, *tables, positions=first, interleaved=interleaved)
        @ apply_rotary(k, *tables, positions=first + 3, interleaved=interleaved).mT
        for first in (0, 30)
    ]
    torch.testing.assert_close(scores[0], scores[1])


def test_empty_inputs() -> None:
    table = torch.zeros(0, 2)
    assert apply_rotary(torch.zeros(2, 3, 0, 4), table, table).shape == (2, 3, 0, 4)
    assert apply_rotary(torch.zeros(0, 3, 0, 4), table, table, positions=torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 0, 4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_it_is_the_same(dynamic) -> None:
    def call(x: Tensor, positions: Tensor) -> Tensor:
        return apply_rotary(x, *Rotary(scaling=Llama3Scaling()).tables(TABLE, 8, dtype=torch.float64), positions=positions)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (7, 5):
        x = rows(8)[:, :, :length].detach().requires_grad_()
        results = [function(x, torch.arange(length) + 3) for function in (call, compiled)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), x) for result in results))


def plain(base: float, dim: int) -> list[float]:
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


def by_wavelength(frequency: float, scaling: Llama3Scaling) -> float:
    """Llama 3.1's rule, case by case."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_length / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def by_ramp(index: int, frequency: float, base: float, dim: int, scaling: YarnScaling) -> float:
    """YaRN's rule: the ramp lies between the pairs that make fast_turns and slow_turns turns, rounded outwards."""
    low, high = (
        dim / 2 * math.log(scaling.original_length / (2 * math.pi * turns)) / math.log(base)
        for turns in (scaling.fast_turns, scaling.slow_turns)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    share = min(max((index - low) / (high - low), 0.0), 1.0)
    return frequency * (1 - share) + frequency / scaling.factor * share


@pytest.mark.parametrize("dim", [2, 6, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_frequencies_are_those_of_the_papers(dim, base) -> None:
    llama, yarn, short = Llama3Scaling(8.0, 1.0, 4.0, 8192), YarnScaling(16.0, 4096), YarnScaling(4.0, 512, 24.0, 2.0)
    expected = {
        None: plain(base, dim),
        LinearScaling(4.0): [frequency / 4.0 for frequency in plain(base, dim)],
        # With two elements the exponent of the formula is infinite; its one frequency is 1 whatever the base.
        NTKScaling(4.0): plain(base * 4.0 ** (dim / (dim - 2)), dim) if dim > 2 else [1.0],
        llama: [by_wavelength(frequency, llama) for frequency in plain(base, dim)],
        yarn: [by_ramp(i, frequency, base, dim, yarn) for i, frequency in enumerate(plain(base, dim))],
        short: [by_ramp(i, frequency, base, dim, short) for i, frequency in enumerate(plain(base, dim))],
    }
    for scaling, frequencies in expected.items():
        got = Rotary(base=base, scaling=scaling).frequencies(dim)
        assert got.tolist() == pytest.approx(frequencies, rel=1e-14), scaling


def test_yarn_strengthens_cos_and_sin() -> None:
    for scaling, amplitude in ((YarnScaling(8.0, 64), 0.1 * math.log(8.0) + 1.0), (YarnScaling(8.0, 64, attention_factor=1.5), 1.5)):
        cos, sin = Rotary(scaling=scaling).tables(9, 8, dtype=torch.float64)
        torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, amplitude**2))


def test_tables_are_right_far_from_the_start() -> None:
    """A float32 product of position and frequency would be off by 0.03 radians at a million."""
    rotary = Rotary(offset=1_000_000)
    cos, sin = rotary.tables(3, 8)
    assert cos.dtype is sin.dtype is torch.float32
    for row in range(3):
        for pair in range(4):
            angle = (1_000_000 + row) * 10000.0 ** (-pair / 4)
            assert cos[row, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[row, pair].item() == pytest.approx(math.sin(angle), abs=1e-7)


X, COS = torch.zeros(2, 3, 4, 6), torch.zeros(5, 3)
WRONG_CALLS = {
    "x of three dimensions": (ValueError, "x has shape (3, 4, 6), expected (batch, heads, seqlen, head_dim)", {"x": X[0]}),
    "x of integers": (TypeError, "x is torch.int64, expected a floating tensor", {"x": X.long()}),
    "cos as a list": (TypeError, "cos is a list, expected a floating tensor", {"cos": [1.0]}),
    "unlike tables": (ValueError, "cos has shape (5, 3), sin (5, 2): expected (table, pairs) of both", {"sin": COS[:, :2]}),
    "tables of heads": (
        ValueError,
        "cos has shape (1, 5, 3), sin (1, 5, 3): expected (table, pairs)",
        {"cos": COS[None], "sin": COS[None]},
    ),
    "too many pairs": (ValueError, "cos has 4 pairs, a head_dim of 6 has at most 3", {"cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4)}),
    "another device": (ValueError, "sin is on meta, x on cpu: move it with sin.to(x.device)", {"sin": COS.to("meta")}),
    "past the table": (
        ValueError,
        "rows stand at positions 2 to 5, cos and sin have positions 0 to 4: make longer tables",
        {"positions": 2},
    ),
    "before the table": (ValueError, "rows stand at positions -1 to 2, cos and sin", {"positions": -1}),
    "positions as floats": (TypeError, "positions is torch.float32, expected int32 or int64", {"positions": torch.zeros(4)}),
    "positions as a float": (TypeError, "positions is 1.0, expected an int tensor", {"positions": 1.0}),
    "positions of heads": (
        ValueError,
        "positions has shape (3, 4), expected (4,) or (2, 4)",
        {"positions": torch.zeros(3, 4, dtype=torch.int64)},
    ),
    "positions elsewhere": (
        ValueError,
        "positions is on meta, x on cpu",
        {"positions": torch.zeros(4, dtype=torch.int64, device="meta")},
    ),
    "no table": (
        ValueError,
        "cos has no rows: give one for every position",
        {"cos": COS[:0], "sin": COS[:0], "positions": torch.zeros(4, dtype=torch.int64)},
    ),
    "interleaved as a number": (TypeError, "interleaved is 1, expected True or False", {"interleaved": 1}),
}


@pytest.mark.parametrize(("error", "sentence", "change"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong(error, sentence, change) -> None:
    call = {"x": X, "cos": COS, "sin": COS, **change}
    with pytest.raises(error, match=re.escape(sentence)):
        apply_rotary(call.pop("x"), call.pop("cos"), call.pop("sin"), **call)


WRONG_VALUES = {
    "base": (ValueError, "base is 0.5, expected a finite number of at least 1.0", lambda: Rotary(base=0.5)),
    "base of one": (ValueError, "base is 1.0: all frequencies would be alike", lambda: Rotary(base=1.0)),
    "infinite base": (ValueError, "base is inf, expected a finite number", lambda: Rotary(base=math.inf)),
    "odd dim": (ValueError, "dim is 3, expected an even int of at least 2", lambda: Rotary(dim=3)),
    "offset": (ValueError, "offset is -1, expected an int of at least 0", lambda: Rotary(offset=-1)),
    "interleaved": (TypeError, "interleaved is None, expected True or False", lambda: Rotary(interleaved=None)),
    "scaling": (TypeError, "scaling is 2.0, expected a Scaling", lambda: Rotary(scaling=2.0)),
    "dim of a small head": (ValueError, "rotary turns 8 elements of a head_dim of 6", lambda: Rotary(dim=8).tables(1, 6)),
    "odd head": (ValueError, "rotary turns 5 elements of a head_dim of 5", lambda: Rotary().tables(1, 5)),
    "linear factor": (ValueError, "factor is 0.5, expected a finite number of at least 1.0", lambda: LinearScaling(0.5)),
    "ntk factor": (ValueError, "factor is nan, expected a finite number", lambda: NTKScaling(math.nan)),
    "yarn length": (ValueError, "original_length is 0, expected a finite number of at least 1", lambda: YarnScaling(2.0, 0)),
    "yarn turns": (ValueError, "fast_turns is 1.0, expected a finite number of at least 2.0", lambda: YarnScaling(2.0, 8, 1.0, 2.0)),
    "yarn amplitude": (ValueError, "attention_factor is 0.0", lambda: YarnScaling(2.0, 8, attention_factor=0.0)),
    "llama factors": (
        ValueError,
        "high_freq_factor is 1.0, low_freq_factor 1.0: the first must be the larger one",
        lambda: Llama3Scaling(8.0, 1.0, 1.0),
    ),
}


@pytest.mark.parametrize(("error", "sentence", "make"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_say_what_is_wrong(error, sentence, make) -> None:
    with pytest.raises(error, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mapped", ["tables", "positions", "rows and tables", "rows"])
def test_vmap_over_any_of_its_tensors(mapped, interleaved) -> None:
    """Where the tables alone are mapped over, the result has a dimension that x has not."""
    x, table = rows(10), angles(3)
    of_x = torch.stack([x, x.flip(2), -x]) if "rows" in mapped else x
    cos = torch.stack([table.cos(), table.sin(), table]) if "tables" in mapped else table.cos()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9] * 7, [49, 3, 1, 8, 8, 0, 2]])

    def turn(x: Tensor, cos: Tensor, positions: Tensor) -> Tensor:
        return apply_rotary(x, cos, table.sin(), positions=positions, interleaved=interleaved)

    dims = (0 if "rows" in mapped else None, 0 if "tables" in mapped else None, 0 if mapped == "positions" else None)
    given = positions if mapped == "positions" else positions[2]
    each = [turn(*(part if dim is None else part[i] for part, dim in zip((of_x, cos, given), dims, strict=True))) for i in range(3)]
    torch.testing.assert_close(torch.func.vmap(turn, in_dims=dims)(of_x, cos, given), torch.stack(each))
