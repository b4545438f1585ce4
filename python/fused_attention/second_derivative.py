"""The derivative of a backward, tile by tile in plain PyTorch, for every backend: memory O(seqlen) here too.

L = sum(weights * backward(dout, dlse, q, k, v, out, lse));   each tile of L is differentiated by autograd
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import scores as pairs
from .blockwise import Operands, TileGradients, accumulate, as_4d, sink_gradient, tile_gradients, tiles
from .problem import Gradients, Problem
from .scores import Geometry, Tile


def double_backward(
    cotangents: Gradients, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor | None, ...]:
    """Gradients of sum(cotangents * backward(...)) for dout, dlse, q, k, v, out, lse, bias, alibi_slopes, sinks, in this order.

    out and lse are inputs here: what reaches them flows on through another first backward.
    """
    where = pairs.locate(problem)
    given = (dout, dlse, q, k, v, out, lse, problem.bias, problem.alibi_slopes, problem.sinks)
    with torch.enable_grad():
        leaves = tuple(None if x is None else x.detach().requires_grad_() for x in given)
        problem = problem._replace(bias=leaves[7], alibi_slopes=leaves[8], sinks=leaves[9])
        operands = Operands.of(*leaves[:7], problem, where)  # type: ignore[arg-type, call-arg]  # dlse alone may be None
        dsinks = None if problem.sinks is None else sink_gradient(problem.sinks, operands.lse, operands.delta)
    weights = _dense_cotangents(cotangents, problem, where)
    total = Operands(*(None if x is None else torch.zeros_like(x, dtype=problem.accumulate_dtype) for x in operands))  # type: ignore[arg-type]
    for tile in tiles(problem, where):
        accumulate(total.cut(tile), _pull_back(weights.cut(tile), operands.cut(tile), problem, where, tile))
    reached = (None if x is None or share is None else share.to(x.dtype) for x, share in zip(operands, total, strict=True))
    return _gradients_of((*operands, dsinks), (*reached, cotangents.sinks), leaves)


def _pull_back(weights: TileGradients, operands: Operands, problem: Problem, where: Geometry, tile: Tile) -> tuple[Tensor | None, ...]:
    """The gradient of sum(weights * tile_gradients(operands)) for each operand."""
    with torch.enable_grad():
        leaves = Operands(*(None if x is None else x.detach().requires_grad_() for x in operands))  # type: ignore[arg-type]
        return _gradients_of(tile_gradients(leaves, problem, where, tile, weights), weights, leaves)


def _gradients_of(
    outputs: Sequence[Tensor | None], weights: Sequence[Tensor | None], leaves: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradient of sum(weights * outputs) for each leaf, None for None; what has no weight does not count."""
    counted = [(x, weight) for x, weight in zip(outputs, weights, strict=True) if x is not None and weight is not None]
    if not counted:
        return (None,) * len(leaves)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in counted], [x for x in leaves if x is not None], [weight for _, weight in counted], allow_unused=True
        )
    )
    return tuple(None if x is None else next(found) for x in leaves)


def _dense_cotangents(cotangents: Gradients, problem: Problem, where: Geometry) -> TileGradients:
    dtype = problem.accumulate_dtype
    dq, dk, dv = (None if x is None else pairs.dense(x, problem).to(dtype) for x in cotangents[:3])
    bias = None if cotangents.bias is None else as_4d(cotangents.bias).to(dtype)
    slopes = None if cotangents.alibi_slopes is None else pairs.slopes_by_row(cotangents.alibi_slopes.to(dtype), problem, where)
    return TileGradients(dq, dk, dv, bias, slopes)
