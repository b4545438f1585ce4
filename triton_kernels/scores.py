"""Scores of a tile of pairs, in units of softmax.py, and how they depend on the products q k^T.

    scores = softcap(scale q k^T) - slope |i + offset - j| + bias,     softcap(x) = c tanh(x / c),     hidden pairs -inf

rows and cols are index tensors that broadcast against each other, so a transposed tile takes the same lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .mask import pair_pointers
from .softmax import LOG2_E


class Terms(NamedTuple):
    """What makes a score of a product; None: that step is absent."""

    scale: float
    softcap: float | None
    slopes: Any  # one number a head
    slopes_batch: int
    slopes_head: int


def terms(scale: float, softcap: float | None, slopes: torch.Tensor | None) -> Terms:
    if slopes is None:
        return Terms(scale, softcap, None, 0, 0)
    return Terms(scale, softcap, slopes, slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))


@triton.jit
def slope(terms, batch, head, ACC: tl.constexpr):
    """The ALiBi slope of a head, or None."""
    number = None
    if terms.slopes is not None:
        place = tl.cast(batch, tl.int64) * terms.slopes_batch + tl.cast(head, tl.int64) * terms.slopes_head
        number = tl.load(terms.slopes + place).to(ACC)
    return number


@triton.jit
def distance(member, rows, cols, ACC: tl.constexpr):
    """|i + offset - j|, exact where it and the offset are below 2**24 (2**53 in float64)."""
    return tl.abs(tl.cast(member.offset, ACC) + (rows - cols).to(ACC))


@triton.jit
def tanh(x):
    """Lambert's continued fraction near 0, where 1 - exp(-2x) would cancel; to the last digits of float64."""
    y = tl.minimum(tl.abs(x), 0.6)
    y2 = y * y
    near = y * (135135.0 + y2 * (17325.0 + y2 * (378.0 + y2)))
    near_under = 135135.0 + y2 * (62370.0 + y2 * (3150.0 + y2 * 28.0))
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    small = tl.abs(x) < 0.6
    magnitude = tl.where(small, near, 1.0 - t) / tl.where(small, near_under, 1.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def cap(products, terms, UNIT: tl.constexpr):
    """Scores before anything is added."""
    if terms.softcap is None:
        capped = products * (terms.scale * UNIT)
    else:
        capped = tanh(products * (terms.scale / terms.softcap)) * (terms.softcap * UNIT)
    return capped


@triton.jit
def uncap(dscores, capped, terms, UNIT: tl.constexpr):
    """The gradient of the scaled products, given that of the scores; 0 stays 0 beside a hidden nan."""
    if terms.softcap is not None:
        tanh_x = capped * (1.0 / (terms.softcap * UNIT))
        dscores = tl.where(dscores == 0.0, 0.0, dscores * (1.0 - tanh_x * tanh_x))
    return dscores


@triton.jit
def score(capped, slope, bias, member, batch, head, rows, cols, seen, UNIT: tl.constexpr):
    """Scores, -inf where a pair is hidden; seen is None where a tile is seen in full."""
    s = capped
    if slope is not None:
        s -= slope * UNIT * distance(member, rows, cols, capped.dtype)
    if bias is not None:
        added = tl.load(pair_pointers(bias, batch, head, rows, cols), mask=seen, other=float("-inf")).to(capped.dtype)
        seen &= added != float("-inf")
        s += added * UNIT
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    return s
