"""The C++ add and normalise and the C++ rotation against float64 autograd, with bounds from the inputs and the number of roundings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_attention import layer_ops
from fused_attention.cpu_backend import CpuBackend
from fused_attention.layer_ops import norm, rotation

MISSING = CpuBackend().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
UNIT = torch.finfo(torch.float32).eps / 2
KINDS = ("layer", "rms")
EPS = 0.1  # large enough to matter


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The kernel, whatever is faster here: out and the sum."""
    out, summed, _, _ = norm.add_norm_op(x, residual, weight, bias, eps, kind == "layer")
    return out, x if residual is None else summed


def within(name: str, got: Tensor, truth: Tensor, bound: Tensor) -> None:
    assert got.shape == truth.shape, name
    assert got.dtype == torch.float32, name
    used = ((got.double() - truth).abs() / (bound + 1e-37)).max().item() if got.numel() else 0.0
    assert used <= 1.0, f"{name} uses {used:.3g} of its bound"


def check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float = EPS) -> None:
    """Forward and every gradient, from the sum as it was rounded."""
    given = [t for t in (x, residual, weight, bias) if t is not None]
    for t in given:
        t.requires_grad_()
    out, summed = run(x, residual, weight, bias, kind, eps)
    assert torch.equal(summed, x if residual is None else x + residual)
    dout, dsummed = normal(*x.shape, seed=7), normal(*x.shape, seed=8)
    if residual is None:
        found = torch.autograd.grad(out, given, dout)
        arrived = torch.zeros(x.shape).double()
    else:
        found = torch.autograd.grad((out, summed), given, (dout, dsummed))
        assert torch.equal(found[0], found[1])
        arrived = dsummed.double()
    width, d64 = x.shape[-1], dout.double()
    s = summed.detach().double().requires_grad_()
    w = (torch.ones(width) if weight is None else weight.detach()).double().requires_grad_()
    b = (torch.zeros(width) if bias is None else bias.detach()).double().requires_grad_()
    mean = s.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(s[..., :1])
    variance = (s - mean).square().mean(-1, keepdim=True) + eps
    truth = (s - mean) * variance.rsqrt() * w + b
    dx, dweight, dbias = torch.autograd.grad((truth * d64 + s * arrived).sum(), (s, w, b))

    with torch.no_grad():
        sums = (width // 16 + 16) * UNIT  # a lane's share, one addition after the other, and the lanes
        if width < 64:
            sums = (width + 16) * UNIT
        rstd, size = variance.rsqrt(), (s - mean).abs()
        mean_error = sums * s.abs().mean(-1, keepdim=True) * (kind == "layer")
        size_error = mean_error + UNIT * (size + mean_error)
        variance_error = (2 * size * size_error + size_error**2).mean(-1, keepdim=True) + sums * variance
        relative = (1 - (variance_error / variance).clamp(max=0.99)).rsqrt() - 1 + 4 * UNIT
        scaled = size * rstd
        scaled_error = (size_error * rstd + scaled * relative) * (1 + relative) + 4 * UNIT * scaled
        most = scaled + scaled_error
        within("out", out.detach(), truth, scaled_error * w.abs() + 4 * UNIT * (most * w.abs() + b.abs()))

        slope = (d64 * w).abs()
        along = (d64 * w * (s - mean) * rstd).mean(-1, keepdim=True).abs()
        along_error = (slope * scaled_error + sums * slope * most).mean(-1, keepdim=True)
        level = (d64 * w).mean(-1, keepdim=True).abs() * (kind == "layer")
        level_error = sums * slope.mean(-1, keepdim=True)
        inner = slope + scaled * along + level
        inner_error = scaled_error * along + most * along_error + level_error + 6 * UNIT * inner
        bound = rstd * (inner_error * (1 + relative) + inner * relative) + 4 * UNIT * (rstd * inner + arrived.abs())
        within("dx", found[0], dx, bound)

        rows = (x.numel() // max(width, 1) + 8) * UNIT
        share = d64.abs()
        vectors = {"dweight": (weight, dweight, share * scaled_error + rows * share * most), "dbias": (bias, dbias, rows * share)}
        got = iter(found[len(given) - (weight is not None) - (bias is not None) :])
        for name, (vector, expected, error) in vectors.items():
            if vector is not None:
                within(name, next(got), expected, error.reshape(-1, width).sum(0))


@pytest.mark.parametrize("width", [1, 3, 17, 63, 64, 257, 1030])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind: str, width: int) -> None:
    check(normal(3, 7, width) + 2.0, normal(3, 7, width, seed=1), normal(width, seed=2), normal(width, seed=3), kind)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: str, rows: int) -> None:
    """More than one part of the sums over rows, and a last one that is not full."""
    check(normal(rows, 33) + 2.0, normal(rows, 33, seed=1), normal(33, seed=2), normal(33, seed=3), kind)


@pytest.mark.parametrize("missing", [(1,), (2,), (3,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given(kind: str, missing: tuple[int, ...]) -> None:
    given = [normal(5, 65) + 2.0, normal(5, 65, seed=1), normal(65, seed=2), normal(65, seed=3)]
    x, residual, weight, bias = (None if i in missing else t for i, t in enumerate(given))
    assert x is not None
    check(x, residual, weight, bias, kind)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    """The mean of squares less the square of the mean would lose every digit of the variance here."""
    check(normal(4, 257) + 1e4, None, normal(257, seed=2), None, "layer", 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str) -> None:
    views = [
        normal(6, 66, 4).transpose(0, 2)[:, ::2],
        normal(4, 33, 12)[..., ::2],
        normal(6)[::2].repeat(2)[:6],
        normal(12)[::2],
    ]
    x, residual = views[0], views[1]
    assert x.shape == residual.shape
    results = []
    for given in (views, [t.contiguous() for t in views]):
        inputs = [t.detach().requires_grad_() for t in given]
        out, summed = run(*inputs, kind)
        dout = torch.tensor(0.7).expand(4, 33, 6)
        results.append((out, summed, *torch.autograd.grad((out, summed), inputs, (dout, normal(6, 33, 4).transpose(0, 2)))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    check(*views, kind)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(kind: str, shape: tuple[int, ...]) -> None:
    given = [normal(*shape), normal(*shape, seed=1), normal(shape[-1]), normal(shape[-1])]
    inputs = [t.requires_grad_() for t in given]
    out, summed = run(*inputs, kind)
    assert out.shape == summed.shape == shape
    dx, _, dweight, dbias = torch.autograd.grad((out, summed), inputs, (torch.ones(shape), torch.ones(shape)))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1]))
    assert torch.equal(dbias, torch.zeros(shape[-1]))


def test_one_output_alone_is_differentiated() -> None:
    x, residual, weight = normal(5, 9).requires_grad_(), normal(5, 9, seed=1).requires_grad_(), normal(9).requires_grad_()
    dout = normal(5, 9, seed=2)
    _, summed = run(x, residual, weight, None, "layer")
    got = torch.autograd.grad(summed, (x, residual, weight), dout, allow_unused=True)
    assert torch.equal(got[0], dout)
    assert torch.equal(got[1], dout)
    assert got[2] is None
    out, _ = run(x, residual, weight, None, "layer")
    assert torch.autograd.grad(out, weight, dout)[0].shape == (9,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_stays_alone(kind: str, bad: float) -> None:
    x, weight = normal(9, 65), normal(65)
    clean, _ = run(x, None, weight, None, kind)
    x[4, 64] = bad
    out, _ = run(x, None, weight, None, kind)
    others = torch.arange(9) != 4
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[4].isnan(), norm.plain_add_norm(x, None, weight, None, EPS, kind).out[4].isnan())


def test_a_wrong_kind_is_named() -> None:
    with pytest.raises(ValueError, match="kind is 'batch', expected one of 'layer', 'rms'"):
        layer_ops.add_norm(normal(2, 3), None, None, eps=EPS, kind="batch")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        layer_ops.add_norm(normal(2, 3), None, normal(4), eps=EPS)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(1, 0), (2, 1), (7, 3), (64, 32), (80, 17), (128, 64)])
def test_rotation(head_dim: int, pairs: int, inverse: bool, interleaved: bool) -> None:
    x = normal(2, 5, 3, head_dim).transpose(1, 2).requires_grad_()  # heads before rows in the shape, after them in memory
    angles = normal(2, 5, pairs)
    cos, sin = (angles.cos(), angles.sin()) if inverse else (angles.cos()[0], angles.sin()[0])
    out = rotation.rotate_op(x, cos, sin, interleaved, inverse)
    x64 = x.detach().double()
    a, b = (x64[..., 0 : 2 * pairs : 2], x64[..., 1 : 2 * pairs : 2]) if interleaved else (x64[..., :pairs], x64[..., pairs : 2 * pairs])
    factor = torch.complex(cos.double(), sin.double() * (-1 if inverse else 1))
    turned = torch.complex(a, b) * (factor[:, None] if factor.dim() == 3 else factor)
    parts = torch.stack((turned.real, turned.imag), -1).flatten(-2) if interleaved else torch.cat((turned.real, turned.imag), -1)
    truth = torch.cat((parts, x64[..., 2 * pairs :]), -1)
    assert out.stride() == x.stride()
    within("out", out.detach(), truth, 4 * UNIT * x64.abs().amax(-1, keepdim=True) * torch.ones(head_dim))
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])
    dout = normal(2, 3, 5, head_dim, seed=1)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(dx, rotation.rotate_op(dout, cos, sin, interleaved, not inverse))
    torch.testing.assert_close((dx * x).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-3)  # a turn keeps products


def test_shapes_of_a_rotation_that_do_not_fit_are_refused() -> None:
    x, table = normal(2, 3, 5, 8), normal(5, 4)
    for bad, sentence in [
        ((x[0], table, table), r"x has shape \(3, 5, 8\), expected \(batch, heads, seqlen, head_dim\)"),
        ((x, table[:4], table[:4]), r"cos has shape \(4, 4\), expected \(5, pairs\) or \(2, 5, pairs\), cos and sin alike"),
        ((x, table, table[:, :3]), r"sin has shape \(5, 3\)"),
        ((x, normal(5, 5), normal(5, 5)), "cos has 5 pairs, and a head_dim of 8 has at most 4"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            layer_ops.rotate(*bad)
