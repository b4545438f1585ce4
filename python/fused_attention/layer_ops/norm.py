"""Add and normalise in one pass: LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) of x + residual.

    summed = x + residual
    out    = (summed - mean) / sqrt(mean((summed - mean)²) + eps) · weight + bias         "layer"
    out    = summed / sqrt(mean(summed²) + eps) · weight + bias                           "rms"

Sources: https://arxiv.org/abs/1607.06450, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, gpu
from .choice import heard, kernel_for
from .operator import Gradients, differentiate, register, through_plain

KINDS = ("layer", "rms")
LEAST_ELEMENTS = 2**17  # below, the way to the C++ kernel costs more than it saves


class AddNorm(NamedTuple):
    """The normalised sum and the sum, both shaped like x."""

    out: Tensor
    summed: Tensor


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: Literal["layer", "rms"] = "layer",
) -> AddNorm:
    """norm(x + residual) · weight + bias, and the sum itself, which is x where there is no residual.

    x, residual: (..., width); weight, bias: (width,) or None for 1 and 0.
    Raises ValueError for another kind, and what torch's own norm raises for shapes and dtypes that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if not _suits(x, residual, weight, bias):
        return plain_add_norm(x, residual, weight, bias, eps, kind)
    run = add_norm_op if heard(x, residual, weight, bias) else _add_norm
    out, summed, _, _ = run(x, residual, weight, bias, eps, kind == "layer")
    return AddNorm(out, x if residual is None else summed)


def plain_add_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> AddNorm:
    summed = x if residual is None else x + residual
    width = (x.shape[-1],)
    if kind == "layer":
        return AddNorm(F.layer_norm(summed, width, weight, bias, eps), summed)
    out = F.rms_norm(summed, width, weight, eps)
    return AddNorm(out if bias is None else out + bias, summed)


def _suits(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    kernel = kernel_for(x, residual, weight, bias)
    if kernel is None or x.dim() == 0 or (kernel == "cpu" and x.numel() < LEAST_ELEMENTS):
        return False
    vectors = all(vector is None or vector.shape == x.shape[-1:] for vector in (weight, bias))
    return vectors and (residual is None or residual.shape == x.shape)


def _add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = gpu.add_norm if x.is_cuda else cpu.add_norm
    return function(x, residual, weight, bias, eps, centred)


def _fake_add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, nothing = x.shape[:-1], (0,)
    statistics = (rows if centred else nothing, rows)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in statistics)
    return x.new_empty(x.shape), x.new_empty(nothing if residual is None else x.shape), mean, rstd


def _add_norm_backward(
    dout: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    function = gpu.add_norm_backward if summed.is_cuda else cpu.add_norm_backward
    return function(dout, dsummed, summed, weight, bias, mean if centred else None, rstd)


def _fake_add_norm_backward(
    dout: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight, dbias = (summed.new_empty(0 if vector is None else vector.shape) for vector in (weight, bias))
    return summed.new_empty(summed.shape), dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.centred = inputs
    _, summed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else summed, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dout: Tensor | None, dsummed: Tensor | None, *_: None) -> Gradients:
    summed, weight, bias, mean, rstd = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if dout is None:
        dx, dweight, dbias = dsummed, None, None
    elif torch.is_grad_enabled():
        # `summed` as an input of its own: what reaches it flows on to x and to the residual alike.
        kind = "layer" if ctx.centred else "rms"
        plain = plain_add_norm(summed, None, weight, bias, ctx.eps, kind).out
        dx, dweight, dbias = through_plain([plain], [dout], (summed, weight, bias))
        dx = dx if dsummed is None or dx is None else dx + dsummed
    else:
        dx, dweight, dbias = add_norm_backward_op(dout, dsummed, summed, weight, bias, mean, rstd, ctx.centred)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        None,
    )


add_norm_op = register(
    "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred) "
    "-> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
    _add_norm,
    _fake_add_norm,
)
add_norm_backward_op = register(
    "add_norm_backward(Tensor dout, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool centred) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _add_norm_backward,
    _fake_add_norm_backward,
)
differentiate("add_norm", _save, _backward)
