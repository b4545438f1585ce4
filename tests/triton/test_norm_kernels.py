"""Add and normalise against its float64 definition and autograd, with bounds from the number of roundings."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels import norm, rows
from fused_attention.triton_kernels.norm import Normalised, NormGradients, add_norm, add_norm_backward

from .memcheck import memcheck
from .rounding import DTYPES, depth, normal, unit, within

KINDS = ("layer", "rms")
WIDTHS = (1, 3, 63, 65, 257, 1031)


class Inputs(NamedTuple):
    """What forward and backward read."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dout: Tensor
    dsummed: Tensor | None
    eps: float


def make(*shape: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, eps: float = 0.1) -> Inputs:
    """Rows with a mean of about 2, so that it matters where it is subtracted; an eps that matters too."""
    x, residual, dout, dsummed = (normal(*shape, seed=seed, dtype=dtype) for seed in range(4))
    weight, bias = (normal(shape[-1], seed=seed, dtype=weight_dtype or dtype) for seed in (4, 5))
    return Inputs(x + 2.0, residual, weight, bias, dout, dsummed, eps)


def run(inputs: Inputs, kind: str) -> tuple[Normalised, NormGradients]:
    result = add_norm(inputs.x, inputs.residual, inputs.weight, inputs.bias, inputs.eps, kind=kind)
    return result, backward(inputs, result)


def backward(inputs: Inputs, result: Normalised) -> NormGradients:
    return add_norm_backward(inputs.dout, inputs.dsummed, result.summed, inputs.weight, inputs.bias, result.mean, result.rstd)


def verify(inputs: Inputs, kind: str, result: Normalised, gradients: NormGradients) -> None:
    """Everything that came back, against the definition in float64, from the sum as it was rounded."""
    x, residual, weight, bias, dout, dsummed, eps = inputs
    assert torch.equal(result.summed, x if residual is None else x + residual)
    summed = result.summed.double().clone().requires_grad_()
    w = (torch.ones(x.shape[-1]) if weight is None else weight).double().clone().requires_grad_()
    b = (torch.zeros(x.shape[-1]) if bias is None else bias).double().clone().requires_grad_()
    mean = summed.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(summed[..., :1])
    variance = (summed - mean).square().mean(-1, keepdim=True) + eps
    out = (summed - mean) * variance.rsqrt() * w + b
    arrived = torch.zeros_like(summed) if dsummed is None else dsummed.double()
    dx, dweight, dbias = torch.autograd.grad((out * dout.double() + summed * arrived).sum(), (summed, w, b))

    with torch.no_grad():
        u, sums = unit(x.dtype), (depth(x.shape[-1]) + 8) * unit(x.dtype)
        size, rstd = (summed - mean).abs(), variance.rsqrt()
        mean_error = sums * summed.abs().mean(-1, keepdim=True) * (kind == "layer")
        size_error = mean_error + u * (size + mean_error)
        variance_error = (2 * size * size_error + size_error**2).mean(-1, keepdim=True) + sums * variance
        relative = (1 - (variance_error / variance).clamp(max=0.99)).rsqrt() - 1 + 4 * u  # the error of rstd, beside it
        scaled = size * rstd  # the size of what is multiplied with the weight
        scaled_error = (size_error * rstd + scaled * relative) * (1 + relative) + 4 * u * scaled
        within("rstd", result.rstd, rstd[..., 0], relative[..., 0] * rstd[..., 0])
        within("out", result.out, out, scaled_error * w.abs() + 4 * u * ((scaled + scaled_error) * w.abs() + b.abs()))

        slope, most = (dout.double() * w).abs(), scaled + scaled_error
        along = (dout.double() * w * (summed - mean) * rstd).mean(-1, keepdim=True).abs()
        along_error = (slope * scaled_error + sums * slope * most).mean(-1, keepdim=True)
        level = (dout.double() * w).mean(-1, keepdim=True).abs() * (kind == "layer")
        level_error = sums * slope.mean(-1, keepdim=True)
        inner = slope + scaled * along + level
        inner_error = scaled_error * along + most * along_error + level_error + 6 * u * inner
        within("dx", gradients.dx, dx, rstd * (inner_error * (1 + relative) + inner * relative) + 4 * u * (rstd * inner + arrived.abs()))

        size = dout.double().abs()
        column_sums = (x.numel() // max(x.shape[-1], 1) + 8) * u
        verify_sum("dweight", gradients.dweight, weight, dweight, size * scaled_error + column_sums * size * most)
        verify_sum("dbias", gradients.dbias, bias, dbias, column_sums * size)
    assert (result.mean is None) == (kind == "rms")
    if result.mean is not None:
        within("mean", result.mean, mean[..., 0], mean_error[..., 0])


def verify_sum(name: str, got: Tensor | None, given: Tensor | None, truth: Tensor, error: Tensor) -> None:
    """A gradient that is a sum over the rows, of terms with this error."""
    assert (got is None) == (given is None)
    if got is not None:
        assert got.dtype == given.dtype
        within(name, got, truth, error.reshape(-1, len(truth)).sum(0))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_and_dtype(kind: str, dtype: torch.dtype, width: int) -> None:
    inputs = make(3, 7, width, dtype=dtype)
    verify(inputs, kind, *run(inputs, kind))


@pytest.mark.parametrize("missing", [("residual",), ("weight",), ("bias",), ("dsummed",), ("residual", "weight", "bias", "dsummed")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given(kind: str, missing: tuple[str, ...]) -> None:
    inputs = make(5, 65)._replace(**dict.fromkeys(missing))
    result, gradients = run(inputs, kind)
    verify(inputs, kind, result, gradients)
    assert (result.summed is inputs.x) == (inputs.residual is None)


@pytest.mark.parametrize("width", [65, 200, 64, 257])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_wider_than_a_block(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "WIDEST_BLOCK", 64)
    inputs = make(2, 9, width, dtype=torch.float64)
    verify(inputs, kind, *run(inputs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_block_that_is_used(kind: str) -> None:
    inputs = make(3, norm.WIDEST_BLOCK + 131, dtype=torch.float16)
    verify(inputs, kind, *run(inputs, kind))


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    """Σx²/width - mean² would lose every digit of the variance here."""
    inputs = make(4, 257)
    inputs = inputs._replace(x=inputs.x + 1e4, residual=None, eps=1e-5)
    result, gradients = run(inputs, "layer")
    verify(inputs, "layer", result, gradients)
    variance = inputs.x.double().var(-1, correction=0) + 1e-5
    assert (result.rstd.double() * variance.sqrt() - 1).abs().max() < 1e-4


def test_weights_wider_than_the_rows_keep_their_dtype() -> None:
    inputs = make(4, 65, dtype=torch.float16, weight_dtype=torch.float32)
    result, gradients = run(inputs, "layer")
    verify(inputs, "layer", result, gradients)
    assert result.out.dtype == gradients.dx.dtype == torch.float16
    assert gradients.dweight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str) -> None:
    """Strided rows, a transposed residual, an expanded gradient, every second weight: the bits of their contiguous copies."""
    inputs = make(4, 6, 33)
    strided = inputs._replace(
        x=torch.cat([inputs.x, inputs.x], -1)[..., :33],
        residual=inputs.residual.transpose(0, 2).contiguous().transpose(0, 2),
        weight=inputs.weight.repeat_interleave(2)[::2],
        dout=torch.tensor(0.7).expand(4, 6, 33),
        dsummed=inputs.dsummed[::2].repeat_interleave(2, 0)[::2].repeat(2, 1, 1),
    )
    plain = Inputs(*(t.contiguous() if isinstance(t, Tensor) else t for t in strided))
    for got, want in zip(flatten(run(strided, kind)), flatten(run(plain, kind)), strict=True):
        assert torch.equal(got, want)
    verify(strided, kind, *run(strided, kind))


def test_strided_rows_are_not_copied() -> None:
    x = torch.zeros(4, 6, 40)[..., :33]
    assert rows.as_rows(x, 24, 33).ptr.data_ptr() == x.data_ptr()
    assert rows.as_rows(x, 24, 33).row == 40


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5), (0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(kind: str, shape: tuple[int, ...]) -> None:
    inputs = make(*shape)
    result, gradients = run(inputs, kind)
    assert result.out.shape == result.summed.shape == gradients.dx.shape == shape
    assert result.rstd.shape == shape[:-1]
    assert torch.equal(gradients.dweight, torch.zeros(shape[-1]))
    assert torch.equal(gradients.dbias, torch.zeros(shape[-1]))


def test_a_single_row_without_leading_dimensions() -> None:
    inputs = make(65)
    verify(inputs, "layer", *run(inputs, "layer"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's word for the inf - inf of the bad row
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_stays_alone(kind: str, bad: float) -> None:
    inputs = make(9, 65)
    (clean, clean_gradients), x = run(inputs, kind), inputs.x.clone()
    x[4, 64] = bad
    result, gradients = run(inputs._replace(x=x), kind)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(result.out[others], clean.out[others])
    assert torch.equal(gradients.dx[others], clean_gradients.dx[others])
    assert not bool(torch.isfinite(result.out[4]).all())
    assert not bool(torch.isfinite(gradients.dweight[64]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    inputs = make(37, 65)
    result, gradients = run(inputs, kind)
    some = slice(20, 23)
    alone = inputs._replace(x=inputs.x[some], residual=inputs.residual[some], dout=inputs.dout[some], dsummed=inputs.dsummed[some])
    part, part_gradients = run(alone, kind)
    assert torch.equal(part.out, result.out[some])
    assert torch.equal(part_gradients.dx, gradients.dx[some])


@pytest.mark.parametrize("width", [3, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_many_parts(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than the second reduction reads at a time, and a last part that is not full."""
    monkeypatch.setattr(norm, "WIDEST_BLOCK", 128)
    monkeypatch.setattr(rows, "FEWEST_ROWS", 1)
    inputs = make(269, width, dtype=torch.float64)
    assert rows.divide(269, norm.tile_for(width).rows).count == (34 if width == 200 else 2)
    verify(inputs, kind, *run(inputs, kind))


@pytest.mark.parametrize("width", [65, 257])
def test_memory_and_order(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No access outside, no race, nothing unwritten; the same bits in every order of the programs and in every run."""
    monkeypatch.setattr(norm, "WIDEST_BLOCK", 128)
    monkeypatch.setattr(rows, "FEWEST_ROWS", 1)
    inputs = make(2, 19, width, dtype=torch.bfloat16)
    want = flatten(run(inputs, "layer"))
    for seed in (None, 0, 1):
        with memcheck(shuffle=seed) as check:
            got = flatten(run(inputs, "layer"))
            check.results(*got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_beyond_two_to_the_31_elements() -> None:
    """6 GB are reserved, of which only the rows are ever touched."""
    far = torch.empty(3 * 2**30 + 8, dtype=torch.float16).as_strided((4, 5), (2**30, 1))
    inputs = make(4, 5, dtype=torch.float16)
    far.copy_(inputs.x)
    with memcheck():
        result = add_norm(far, None, None, None, 0.1, kind="layer")
        gradients = add_norm_backward(far, None, far, None, None, result.mean, result.rstd)
    want = add_norm(inputs.x, None, None, None, 0.1, kind="layer")
    assert torch.equal(result.out, want.out)
    assert torch.equal(gradients.dx, add_norm_backward(inputs.x, None, inputs.x, None, None, want.mean, want.rstd).dx)


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = make(4, 6)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        add_norm(inputs.x, inputs.residual[:3], None, None, 0.1, kind="layer")
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        add_norm(inputs.x, None, inputs.weight[:3], None, 0.1, kind="rms")


def flatten(results: tuple[Normalised, NormGradients]) -> list[Tensor]:
    return [tensor for result in results for tensor in result if tensor is not None]
