"""Online softmax: a row's maximum, sum and weighted values, folded in one key tile at a time.

UNIT is what scores are multiplied with: log2(e), so that every exponential is a single exp2; or 1 beside a bias, whose numbers may be
as large as their type holds, and would overflow.

Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import matmul

LN_2 = tl.constexpr(math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def sink(sinks, stride, head, ACC: tl.constexpr):
    """The sink's logit of a head, or None."""
    number = None
    if sinks is not None:
        number = tl.load(sinks + tl.cast(head, tl.int64) * stride).to(ACC)
    return number


@triton.jit
def start(sink, UNIT: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    """acc, row_max, row_sum before the first key: nothing, or a sink's logit (a number or one a row) that has no value."""
    row_max = tl.full([ROWS], float("-inf"), ACC)
    row_sum = tl.zeros([ROWS], ACC)
    if sink is not None:
        row_max = tl.maximum(row_max, sink * UNIT)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)
    return matmul.zeros(ROWS, DIM, ACC), row_max, row_sum


@triton.jit
def exponential(x, UNIT: tl.constexpr):
    """exp of a difference of scores."""
    return tl.exp2(x) if UNIT != 1.0 else tl.exp2(x * LOG2_E)


@triton.jit
def finite_pivot(row_max):
    # -inf - -inf would be nan: a row that has seen no key keeps a finite pivot.
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def update(acc, row_max, row_sum, scores, v, factor, UNIT: tl.constexpr, PRECISION: tl.constexpr):
    """Fold in a tile of keys; factor is dropout's 0 or 1 / (1 - p) for every weight, or None."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    pivot = finite_pivot(new_max)
    p = exponential(scores - pivot[:, None], UNIT)
    rescale = exponential(row_max - pivot, UNIT)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if factor is not None:
        p *= factor
    acc = matmul.add_product(matmul.scale(acc, rescale[:, None]), p, v, PRECISION)
    return acc, new_max, row_sum


@triton.jit
def merge(acc, row_max, row_sum, lse, tiles):
    """Fold in the outputs (PARTS, DIM) of one row over parts of its keys, with their lse; UNIT is 1."""
    new_max = tl.maximum(row_max, tl.max(lse, 0))
    pivot = finite_pivot(new_max)
    weights = exponential(lse - pivot, 1.0)
    rescale = exponential(row_max - pivot, 1.0)
    out = ()
    for chunk in tl.static_range(len(acc)):
        out = out + (acc[chunk] * rescale[:, None] + tl.sum(weights[:, None] * tiles[chunk], 0)[None, :],)
    return out, new_max, row_sum * rescale + tl.sum(weights, 0)


@triton.jit
def finish(acc, row_max, row_sum, UNIT: tl.constexpr):
    """Normalised output and its natural-log lse; a row that saw no key gives 0 and -inf."""
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = tl.where(row_sum == 0.0, float("-inf"), finite_pivot(row_max) * (1.0 / UNIT) + tl.log2(total) * LN_2)
    return matmul.scale(acc, 1.0 / total[:, None]), lse
