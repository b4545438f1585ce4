"""Bias and activation against torch's in float64 and its autograd, with bounds from the number of roundings."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels import rows
from fused_attention.triton_kernels.activation import ActivationGradients, bias_activation, bias_activation_backward

from .memcheck import memcheck
from .rounding import DTYPES, normal, unit, within

# Numpy's word for squares and exponentials whose reciprocals are rightly 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def gelu_tanh(x: Tensor) -> Tensor:
    """(1 + tanh y) / 2 = sigmoid(2y), which keeps the digits that 1 + tanh y loses where it is small."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu}
KINDS = [(name, gated) for name in ACTIVATIONS for gated in (False, True)]


class Inputs(NamedTuple):
    """What forward and backward read."""

    x: Tensor
    bias: Tensor | None
    dout: Tensor


def make(*shape: int, gated: bool, dtype: torch.dtype = torch.float32) -> Inputs:
    """For an output of this shape; the activations' bend and both their tails occur."""
    leading, wide = shape[:-1], shape[-1] * (2 if gated else 1)
    x, bias, dout = normal(*leading, wide, seed=0, dtype=dtype), normal(wide, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)
    return Inputs(3 * x, bias, dout)


def run(inputs: Inputs, activation: str, gated: bool) -> tuple[Tensor, ActivationGradients]:
    x, bias, dout = inputs
    return (
        bias_activation(x, bias, activation=activation, gated=gated),
        bias_activation_backward(dout, x, bias, activation=activation, gated=gated),
    )


class Curve(NamedTuple):
    """An activation and its derivative at some points, with the errors of both."""

    value: Tensor
    value_error: Tensor
    slope: Tensor
    slope_error: Tensor


def curve(activation: str, x: Tensor, x_error: Tensor, u: float) -> Curve:
    """x, in float64, has an error of its own; every operation adds one of u, and exp and erf one of 4 u."""
    point = x.clone().requires_grad_()
    value = ACTIVATIONS[activation](point)
    slope = torch.autograd.grad(value.sum(), point, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), point)[0].abs()
    value, slope, size = value.detach(), slope.detach(), x.abs()
    if activation == "gelu":
        density = size * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        share_error = u * (6 + 4 * density)  # of the share below x; erf and 1 are added, so its error is absolute
        slope_error = share_error + density * u * (12 + 2 * x * x)
    else:
        # sigmoid(a) has the relative error of exp(-a), and that of a times what is left of 1.
        cubic = 0.044715 * x * x
        a = x if activation == "silu" else 2 * math.sqrt(2 / math.pi) * x * (1 + cubic)
        share, rest = torch.sigmoid(a), torch.sigmoid(-a)
        relative = 8 * u + (0 if activation == "silu" else 8 * u) * a.abs()
        share_error = share * relative + 2.0**-126  # past exp(88) float32 knows no reciprocal but 0
        lean = size * rest * (1 if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (1 + 3 * cubic))
        slope_error = share_error * (1 + lean) + share * (2 * u + lean * (relative + 10 * u))
    value_error = size * share_error + 4 * u * value.abs()
    return Curve(value, value_error + slope.abs() * x_error, slope, slope_error + 2 * u * slope.abs() + bend * x_error)


def verify(inputs: Inputs, activation: str, gated: bool, out: Tensor, gradients: ActivationGradients) -> None:
    x, bias, dout = inputs
    u = unit(x.dtype)
    exact = x.double().clone().requires_grad_()
    offset = (torch.zeros(x.shape[-1]) if bias is None else bias).double().clone().requires_grad_()
    gate, value = (exact + offset).chunk(2, -1) if gated else (exact + offset, torch.ones_like(exact))
    truth = ACTIVATIONS[activation](gate) * value
    dx, dbias = torch.autograd.grad((truth * dout.double()).sum(), (exact, offset))

    gate, value, g = gate.detach(), value.detach(), dout.double().abs()
    value_error = u * value.abs() * gated
    at = curve(activation, gate, u * gate.abs(), u)
    error = at.value_error * (value.abs() + value_error) + at.value.abs() * (value_error + 2 * u * value.abs())
    within("out", out, truth.detach(), error)

    dgate = (at.slope * value).abs()
    errors = [g * (at.slope_error * (value.abs() + value_error) + at.slope.abs() * value_error + 4 * u * dgate)]
    if gated:
        errors.append(g * (at.value_error + 2 * u * at.value.abs()))
    error = torch.cat(errors, -1)
    within("dx", gradients.dx, dx, error)
    assert (gradients.dbias is None) == (bias is None)
    if bias is not None:
        terms, wide = dx.abs() + error, x.shape[-1]
        error = error + (x.numel() // max(wide, 1) + 8) * u * terms
        within("dbias", gradients.dbias, dbias, error.reshape(-1, wide).sum(0))


def test_the_truth_is_what_torch_means() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert (gelu_tanh(x) - F.gelu(x, approximate="tanh")).abs().max() < 16 * 2.0**-52


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_every_dtype(activation: str, gated: bool, dtype: torch.dtype) -> None:
    inputs = make(3, 5, 257, gated=gated, dtype=dtype)
    verify(inputs, activation, gated, *run(inputs, activation, gated))


@pytest.mark.parametrize("width", [1, 3, 63, 65, 512, 1031])
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_every_width(activation: str, gated: bool, width: int) -> None:
    inputs = make(3, 5, width, gated=gated)
    verify(inputs, activation, gated, *run(inputs, activation, gated))


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_without_a_bias(activation: str, gated: bool) -> None:
    inputs = make(7, 65, gated=gated)._replace(bias=None)
    verify(inputs, activation, gated, *run(inputs, activation, gated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_the_tails_are_exact(activation: str, gated: bool, dtype: torch.dtype) -> None:
    """Far out an activation is its argument or 0, and its derivative 1 or 0; no infinity on the way becomes a nan."""
    far = torch.tensor([[50.0, 1e4, 1e19, 1e25, 3e38, -800.0, -1e4, -1e19, -1e25, -3e38]], dtype=dtype)
    want = (far > 0).to(dtype)
    x = torch.cat([far, torch.ones_like(far)], -1) if gated else far
    out, gradients = run(Inputs(x, None, torch.ones_like(far)), activation, gated)
    assert torch.equal(out, far * want)
    assert torch.equal(gradients.dx[:, :10], want)


@pytest.mark.parametrize("gated", [False, True])
def test_any_strides(gated: bool) -> None:
    """Strided rows, transposed tensors, an expanded gradient, every second bias: the bits of their contiguous copies."""
    inputs = make(4, 6, 34, gated=gated)
    strided = Inputs(
        x=inputs.x.transpose(0, 1).contiguous().transpose(0, 1),
        bias=inputs.bias.repeat_interleave(2)[::2],
        dout=torch.tensor(0.7).expand(4, 6, 34),
    )
    plain = Inputs(*(t.contiguous() for t in strided))
    for got, want in zip(flatten(run(strided, "silu", gated)), flatten(run(plain, "silu", gated)), strict=True):
        assert torch.equal(got, want)
    columns = strided._replace(x=torch.cat([inputs.x, inputs.x], -1)[..., : inputs.x.shape[-1]], dout=inputs.dout)
    verify(columns, "silu", gated, *run(columns, "silu", gated))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4), (0, 0)])
@pytest.mark.parametrize("gated", [False, True])
def test_empty_sizes(gated: bool, shape: tuple[int, ...]) -> None:
    inputs = make(*shape, gated=gated)
    out, gradients = run(inputs, "gelu", gated)
    assert out.shape == shape
    assert gradients.dx.shape == inputs.x.shape
    assert torch.equal(gradients.dbias, torch.zeros_like(inputs.bias))


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_a_nan_stays_in_its_row_and_column(activation: str, gated: bool) -> None:
    inputs = make(9, 65, gated=gated)
    clean, clean_gradients = run(inputs, activation, gated)
    x = inputs.x.clone()
    x[4, 64] = math.nan
    out, gradients = run(inputs._replace(x=x), activation, gated)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[4, 64] = True
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], clean[~hit])
    hit = torch.cat([hit, hit], -1) if gated else hit
    assert torch.equal(gradients.dx.isnan(), hit)
    assert torch.equal(gradients.dx[~hit], clean_gradients.dx[~hit])
    assert torch.equal(gradients.dbias.isnan(), hit.any(0))
    assert torch.equal(gradients.dbias[~hit.any(0)], clean_gradients.dbias[~hit.any(0)])


def test_a_row_does_not_depend_on_the_others() -> None:
    inputs = make(37, 65, gated=True)
    out, gradients = run(inputs, "gelu", True)
    part, part_gradients = run(Inputs(inputs.x[18:23], inputs.bias, inputs.dout[18:23]), "gelu", True)
    assert torch.equal(part, out[18:23])
    assert torch.equal(part_gradients.dx, gradients.dx[18:23])


@pytest.mark.parametrize("gated", [False, True])
def test_sums_over_many_parts(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than the second reduction reads at a time, and a last part that is not full."""
    monkeypatch.setattr(rows, "FEWEST_ROWS", 1)
    inputs = make(145, 3, gated=gated, dtype=torch.float64)
    assert rows.divide(145, 4).count == 37
    verify(inputs, "gelu", gated, *run(inputs, "gelu", gated))


@pytest.mark.parametrize("gated", [False, True])
def test_memory_and_order(gated: bool) -> None:
    """No access outside, no race, nothing unwritten; the same bits in every order of the programs and in every run."""
    inputs = make(2, 19, 257, gated=gated, dtype=torch.bfloat16)
    want = flatten(run(inputs, "gelu_tanh", gated))
    for seed in (None, 0, 1):
        with memcheck(shuffle=seed) as check:
            got = flatten(run(inputs, "gelu_tanh", gated))
            check.results(*got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_beyond_two_to_the_31_elements() -> None:
    """6 GB are reserved, of which only the rows are ever touched."""
    far = torch.empty(3 * 2**30 + 8, dtype=torch.float16).as_strided((4, 6), (2**30, 1))
    inputs = make(4, 3, gated=True, dtype=torch.float16)
    far.copy_(inputs.x)
    want = run(inputs, "silu", True)
    with memcheck():
        got = run(inputs._replace(x=far), "silu", True)
    for a, b in zip(flatten(got), flatten(want), strict=True):
        assert torch.equal(a, b)


def test_rows_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has rows of 7 elements: .* must be even"):
        bias_activation(torch.zeros(2, 7), None, activation="silu", gated=True)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        bias_activation(torch.zeros(2, 8), torch.zeros(4), activation="silu", gated=True)


def flatten(results: tuple[Tensor, ActivationGradients]) -> list[Tensor]:
    return [results[0], *(tensor for tensor in results[1] if tensor is not None)]
