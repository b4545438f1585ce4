"""The C++ linear layer and the gated activations against float64 autograd, with bounds from the inputs and the number of roundings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention import layer_ops
from fused_attention.cpu_backend import CpuBackend
from fused_attention.layer_ops import onednn, projection

MISSING = CpuBackend().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
UNIT = torch.finfo(torch.float32).eps / 2
CHAIN = 256  # products that one running sum takes
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
GATES = {"swiglu": F.silu, "geglu": F.gelu}
SIZES = [(1, 1, 1), (3, 17, 63), (17, 3, 257), (63, 257, 1), (257, 63, 17), (70, 290, 1100)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed + sum(shape))).float()


def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    """The kernel, whatever is faster here; what backward needs is kept, or made again."""
    return projection.linear_op(x, weight, bias, residual, activation, activation is not None and len(x) % 2 == 1)[0]


def within(name: str, got: Tensor, truth: Tensor, bound: Tensor) -> None:
    assert got.shape == truth.shape, name
    assert got.dtype == torch.float32, name
    used = ((got.double() - truth).abs() / (bound + 1e-37)).max().item() if got.numel() else 0.0
    assert used <= 1.0, f"{name} uses {used:.3g} of its bound"


def sum_error(terms: int) -> float:
    """The share of Σ |term| that a sum of products may be off by: chains of CHAIN, then the sums of the chains."""
    return (min(terms, CHAIN) + terms // CHAIN + 2) * UNIT


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dout: Tensor, activation: str | None) -> None:
    """Forward and every gradient."""
    given = [t for t in (x, weight, bias, residual) if t is not None]
    for t in given:
        t.requires_grad_()
    out = run(x, weight, bias, residual, activation)
    found = torch.autograd.grad(out, given, dout)
    x64, w64, d64 = x.detach().double(), weight.detach().double(), dout.double()
    b64 = torch.zeros(len(w64)).double() if bias is None else bias.detach().double()
    r64 = torch.zeros(out.shape).double() if residual is None else residual.detach().double()
    pre = (x64 @ w64.mT + b64).requires_grad_()
    if activation is None:
        act = pre
    elif activation in GATES:
        gate, value = pre.chunk(2, -1)
        act = GATES[activation](gate) * value
    else:
        act = ACTIVATIONS[activation](pre)
    (slope,) = torch.autograd.grad(act, pre, d64)
    with torch.no_grad():
        pre_error = sum_error(x.shape[-1]) * (x64.abs() @ w64.mT.abs() + b64.abs())
        act_error, slope_error = activation_errors(pre, pre_error, d64, activation)
        within("out", out.detach(), act + r64, act_error + 2 * UNIT * (act + r64).abs())
        flat = x64.flatten(0, -2), slope.flatten(0, -2), slope_error.flatten(0, -2)
        rows, slope, slope_error = flat
        truths = [slope @ w64, slope.mT @ rows, slope.sum(0)]
        bounds = [slope_error @ w64.abs(), slope_error.mT @ rows.abs(), slope_error.sum(0)]
        sizes = [slope.abs() @ w64.abs(), slope.abs().mT @ rows.abs(), slope.abs().sum(0)]
        terms = [len(w64), len(rows), len(rows)]
        for name, got, truth, bound, size, count in zip(("dx", "dweight", "dbias"), found, truths, bounds, sizes, terms, strict=False):
            within(name, got.reshape(truth.shape), truth, 1.01 * bound + 1.01 * sum_error(count) * size)
        if residual is not None:
            assert torch.equal(found[-1], dout)


def activation_errors(pre: Tensor, pre_error: Tensor, dout: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """What rounding may do to act and to dout · act': the slopes of all activations are below 1.2, and theirs below 1."""
    if activation is None:
        return pre_error, torch.zeros_like(pre)
    own = 6 * UNIT * (1 + pre.abs())
    if activation not in GATES:
        return 1.2 * pre_error + own, dout.abs() * (pre_error + own)
    (gate, value), (gate_error, value_error), (gate_own, _) = pre.chunk(2, -1), pre_error.chunk(2, -1), own.chunk(2, -1)
    act_error = 1.2 * gate_error + gate_own
    product = act_error * (value.abs() + value_error) + gate.abs() * value_error + 2 * UNIT * (gate * value).abs()
    slopes = (gate_error + gate_own) * (value.abs() + value_error) + 1.2 * value_error + 4 * UNIT * value.abs()
    return product, torch.cat((dout.abs() * slopes, dout.abs() * (act_error + 2 * UNIT * gate.abs())), -1)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("rows", "columns", "steps"), SIZES)
def test_sizes(rows: int, columns: int, steps: int, activation: str | None) -> None:
    residual = normal(rows, columns, seed=3) if columns % 2 else None
    bias = normal(columns, seed=2) if rows % 2 else None
    check(normal(rows, steps), normal(columns, steps, seed=1), bias, residual, normal(rows, columns, seed=4), activation)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize(("rows", "columns", "steps"), SIZES)
def test_gated_sizes(rows: int, columns: int, steps: int, activation: str) -> None:
    weight, residual = normal(2 * columns, steps, seed=1) / steps**0.5, normal(rows, columns, seed=3) if rows % 2 else None
    check(normal(rows, steps), weight, normal(2 * columns, seed=2), residual, normal(rows, columns, seed=4), activation)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("rows", "columns", "steps"), [*SIZES, (600, 40, 30)])
def test_small_integers_are_exact(rows: int, columns: int, steps: int, activation: str | None) -> None:
    """No rounding anywhere, so every bit is right; of relu it shows that 0 has a slope of 0."""
    given = [integers(rows, steps), integers(columns, steps, seed=1), integers(columns, seed=2), integers(rows, columns, seed=3)]
    dout = integers(rows, columns, seed=4)
    for residual in (given[3], None):
        inputs = [t.requires_grad_() for t in (*given[:3], residual) if t is not None]
        got = run(given[0], given[1], given[2], residual, activation)
        want = projection.plain_linear(given[0], given[1], given[2], residual, activation)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_leading_dimensions_and_strides(activation: str | None) -> None:
    """Any view gives the bits of its contiguous copy: transposed, cut, expanded, reversed in memory."""
    x = normal(31, 6, 10).transpose(0, 2)[:, 1:5]  # (10, 4, 31)
    weight = normal(31, 90)[:, ::2].mT  # (45, 31), neighbours along a row 90 apart
    bias, residual = normal(90)[::2], normal(4, 1, 45).expand(4, 10, 45).transpose(0, 1)
    views = [x, weight, bias, residual]
    copies = [t.contiguous() for t in views]
    dout = torch.tensor(0.3).expand(10, 4, 45)
    results = []
    for inputs in (views, copies):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = run(*inputs, activation)
        results.append((out, *torch.autograd.grad(out, inputs, dout)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    check(x, weight, bias, residual, dout, activation)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "swiglu"])
@pytest.mark.parametrize(("rows", "columns", "steps"), [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
def test_empty_sizes(rows: int, columns: int, steps: int, activation: str | None) -> None:
    given = [normal(rows, steps), normal(columns, steps), normal(columns), None]
    inputs = [t.requires_grad_() for t in given if t is not None]
    got, want = run(*given, activation), projection.plain_linear(*given, activation)
    torch.testing.assert_close(got, want)
    dout = normal(*want.shape)
    for a, b in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_values_that_are_not_finite_go_where_torch_sends_them(activation: str | None) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, -1e20, 0.0, -0.0, 1e-40, 30.0, -30.0])
    x = torch.cat((special, normal(21)))[:, None].requires_grad_()
    weight = torch.ones(1, 1)
    got = run(x, weight, None, None, activation)
    # In float64: in float32 torch's gelu of infinity is nan.
    want = projection.plain_linear(x.double(), weight.double(), None, None, activation).float()
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-6, rtol=1e-6)
    (slope,) = torch.autograd.grad(got.sum(), x)
    finite = x.isfinite()
    truth = torch.autograd.grad(projection.plain_linear(x.double(), weight.double(), None, None, activation).sum(), x)[0]
    torch.testing.assert_close(slope[finite], truth.nan_to_num(1.0, 1.0, 0.0)[finite], atol=1e-6, rtol=1e-6)


def test_a_bad_row_stays_alone() -> None:
    x, weight = normal(30, 40), normal(50, 40)
    want = run(x, weight, None, None, "silu")
    x[7, 39] = torch.nan
    got = run(x, weight, None, None, "silu")
    assert got[7].isnan().all()
    others = torch.arange(30) != 7
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (2, 5, 126), (257, 6), (0, 4), (3, 0)])
def test_gated(shape: tuple[int, ...], activation: str) -> None:
    x = normal(*shape).requires_grad_()
    out = torch.ops.fused_attention.activate(x, None, activation)
    gate, value = x.detach().double().requires_grad_().chunk(2, -1)
    truth = GATES[activation](gate) * value
    dout = normal(*out.shape, seed=1)
    (got,) = torch.autograd.grad(out, x, dout)
    want = torch.cat(torch.autograd.grad(truth, (gate, value), dout.double()), -1)
    size = (1 + gate.abs()) * (1 + value.abs())
    within("out", out, truth, 8 * UNIT * size)
    within("dx", got, want, 8 * UNIT * torch.cat((size, size), -1) * dout.abs().repeat(*(1,) * (x.dim() - 1), 2))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_bfloat16_by_onednn(activation: str | None, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn._available():
        pytest.skip("this PyTorch or this CPU has no bfloat16 product of oneDNN")
    monkeypatch.setattr(onednn, "LEAST_FLOPS", 0)
    given = [normal(2, 33, 70), normal(45, 70, seed=1), normal(45, seed=2), normal(2, 33, 45, seed=3) if residual else None]
    x, weight, bias, extra = (None if t is None else t.bfloat16() for t in given)
    assert onednn.takes(x, weight, bias, activation)
    got = layer_ops.linear(x, weight, bias, activation=activation, residual=extra)
    assert got.dtype is torch.bfloat16
    x64, w64, b64 = x.double(), weight.double(), bias.double()
    pre = x64 @ w64.mT + b64
    act = pre if activation is None else ACTIVATIONS[activation](pre)
    sums = 72 * UNIT * (x64.abs() @ w64.mT.abs() + b64.abs())
    error = 1.2 * sums + 6 * UNIT * (1 + pre.abs())
    half = torch.finfo(torch.bfloat16).eps / 2
    if residual:
        error, act = error + half * (act.abs() + error), act + extra.double()
    error = error + half * (act.abs() + error)
    assert ((got.double() - act).abs() <= error).all()
    with torch.enable_grad():
        assert not onednn.takes(x.requires_grad_(), weight, bias, activation)
        assert layer_ops.linear(x, weight, bias, activation=activation).requires_grad


def test_a_wrong_activation_is_named() -> None:
    x = normal(4, 6)
    with pytest.raises(ValueError, match="activation is 'tanh', expected None or one of 'relu', 'gelu'"):
        layer_ops.linear(x, x, activation="tanh")
    with pytest.raises(ValueError, match="activation is 'gelu', expected one of 'swiglu', 'geglu'"):
        layer_ops.gated(x, activation="gelu")
    with pytest.raises(ValueError, match="swiglu was given rows of 5 elements: it halves them"):
        layer_ops.gated(x[:, :5])
    with pytest.raises(ValueError, match="geglu was given rows of 3 elements: it halves them"):
        layer_ops.linear(x, x[:3], activation="geglu")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer_ops.linear(x, x[:, :5])
