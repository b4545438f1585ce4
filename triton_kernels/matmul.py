"""Matrix products of chunked tiles, accumulated in fp32 (fp64 for fp64): the only place that calls tl.dot.

PRECISION is what an fp32 product does on tensor cores: "tf32x3" keeps fp32's accuracy in three products, "tf32" rounds the operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tensor import chunks, width


@triton.constexpr_function
def accumulate_dtype(dtype):
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def contract(a, b, PRECISION: tl.constexpr):
    """a b^T over the columns of both."""
    ACC: tl.constexpr = accumulate_dtype(a[0].dtype)
    total = tl.dot(a[0], b[0].T, input_precision=PRECISION, out_dtype=ACC)
    for chunk in tl.static_range(1, len(a)):
        total = tl.dot(a[chunk], b[chunk].T, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def zeros(ROWS: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(chunks(DIM)):
        tiles = tiles + (tl.zeros([ROWS, width(DIM, chunk)], ACC),)
    return tiles


@triton.jit
def add_product(total, weights, rows, PRECISION: tl.constexpr):
    """total + weights rows, the weights rounded to the rows' dtype."""
    out = ()
    for chunk in tl.static_range(len(total)):
        w = weights.to(rows[chunk].dtype)
        out = out + (tl.dot(w, rows[chunk], total[chunk], input_precision=PRECISION, out_dtype=total[chunk].dtype),)
    return out


@triton.jit
def scale(tiles, factor):
    """Every chunk times a number, or a number a row as (ROWS, 1)."""
    out = ()
    for chunk in tl.static_range(len(tiles)):
        out = out + (tiles[chunk] * factor,)
    return out


@triton.jit
def row_products(a, b):
    """The scalar product of each row of a with the same row of b, in the accumulate dtype."""
    ACC: tl.constexpr = accumulate_dtype(a[0].dtype)
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), 1)
    for chunk in tl.static_range(1, len(a)):
        total += tl.sum(a[chunk].to(ACC) * b[chunk].to(ACC), 1)
    return total


@triton.jit
def finite_rows(tiles):
    """The tiles with zeros for rows that are not finite, and which were: 0 * nan is nan, so a hidden row must not enter a product."""
    broken = tl.zeros([tiles[0].shape[0]], tl.int32)
    for chunk in tl.static_range(len(tiles)):
        infinite = ~(tl.abs(tiles[chunk].to(accumulate_dtype(tiles[chunk].dtype))) < float("inf"))
        broken = tl.maximum(broken, tl.max(infinite.to(tl.int32), 1))
    out = ()
    for chunk in tl.static_range(len(tiles)):
        out = out + (tl.where((broken > 0)[:, None], tl.zeros_like(tiles[chunk]), tiles[chunk]),)
    return out, broken > 0


@triton.jit
def poison_rows(tiles, s, broken):
    """nan for rows that see a key whose value is not finite; a score of -inf is a hidden pair."""
    poisoned = tl.max(((s != float("-inf")) & broken[None, :]).to(tl.int32), 1) > 0
    out = ()
    for chunk in tl.static_range(len(tiles)):
        out = out + (tl.where(poisoned[:, None], float("nan"), tiles[chunk]),)
    return out
