"""What both passes of the backward make of a tile of scores.

p = exp(scores - lse),   ds = p (dropout (dout v^T) - delta),   delta = rowsum(dout out) - dlse
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import dropout as drop
from . import mask as masks
from . import scores
from .options import Options
from .softmax import exponential, finite_pivot
from .tensor import View, broadcast_view, rows_view, view


class Operands(NamedTuple):
    """What every pass reads, as the first arguments of its kernel."""

    q: View
    k: View
    v: View
    dout: View
    lse: View
    delta: View
    sight: masks.Sight
    terms: scores.Terms
    mask: View | None
    bias: View | None
    dropout: drop.Dropout | None


def operands(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, sight: masks.Sight,
    options: Options,
) -> Operands:  # fmt: skip
    tensors: list[Any] = [view(x) for x in (q, k, v, dout)] + [rows_view(x) for x in (lse, delta)]
    return Operands(
        *tensors,
        sight=sight,
        terms=scores.terms(options.scale, options.softcap, options.alibi_slopes),
        mask=broadcast_view(options.mask),
        bias=broadcast_view(options.bias),
        dropout=drop.dropout(options),
    )


@triton.jit
def probabilities(s, row_lse, UNIT: tl.constexpr):
    """exp(scores - lse); of a row whose lse is -inf every score is too."""
    return exponential(s - finite_pivot(row_lse) * UNIT, UNIT)


@triton.jit
def score_gradients(p, dp, row_delta, factor, s, MASKED: tl.constexpr):
    """The gradient of the scores as they enter the softmax; 0 where the pair is hidden, whatever its dp."""
    if factor is not None:
        dp *= factor
    ds = p * (dp - row_delta)
    return tl.where(s == float("-inf"), 0.0, ds) if MASKED else ds
