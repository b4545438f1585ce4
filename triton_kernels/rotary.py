"""Rotary position embedding (Su et al. 2021): each pair of a row's elements turns by an angle that grows with the row's position.

    out_a = x_a · cos - x_b · sin,  out_b = x_b · cos + x_a · sin      cos, sin at (position, pair)

Pair i is (x_i, x_{i + pairs}), or (x_{2i}, x_{2i + 1}) if interleaved. What lies past the pairs is copied. Backward is the inverse turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .rows import as_rows, inside, load_tile, widen
from .tensor import rows_view, view


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | int = 0,
    interleaved: bool = False,
    inverse: bool = False,
) -> torch.Tensor:
    """x: (batch, heads, seqlen, head_dim); cos, sin: (table, rotary_dim / 2) with rotary_dim <= head_dim.

    positions: of every row, (batch, seqlen) or of a shape that expands to it; or the position of the first row of each sequence.
    A position outside the table counts as its nearest end. Computed in the accumulate dtype and rounded once.
    """
    batch, heads, seqlen, head_dim = x.shape
    table, pairs = cos.shape
    if 2 * pairs > head_dim:
        raise ValueError(f"cos has {pairs} columns, one for each pair: a head_dim of {head_dim} has at most {head_dim // 2} pairs")
    if table == 0 and x.numel() > 0:
        raise ValueError("cos has no rows: give one for every position")
    out = torch.empty_like(x)
    offset, given = (positions, None) if isinstance(positions, int) else (0, positions.expand(batch, seqlen)[:, None])
    rows = max(1, 4096 // triton.next_power_of_2(max(head_dim, 1)))
    launch(
        rotate_kernel, triton.cdiv(seqlen, rows) * batch * heads, x.device,
        view(x), as_rows(cos, table, pairs), as_rows(sin, table, pairs), rows_view(given), view(out),
        heads, seqlen, head_dim, offset, table, pairs,
        INTERLEAVED=interleaved, INVERSE=inverse, ROWS=rows, PAIRS=triton.next_power_of_2(max(pairs, 1)),
        REST=triton.next_power_of_2(head_dim - 2 * pairs) if head_dim > 2 * pairs else 0,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["offset"])  # decoding counts it up: it must not compile the kernel anew
def rotate_kernel(
    x, cos, sin, positions, out,
    heads, seqlen, head_dim, offset, table, pairs,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program turns ROWS rows of one head."""
    tiles = tl.cdiv(seqlen, ROWS)
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)

    place = position(positions, offset, batch, rows, seqlen, table)
    pair = tl.arange(0, PAIRS)
    turn_cos = load_tile(cos, place, pair, table, pairs)
    turn_sin = load_tile(sin, place, pair, table, pairs)
    if INVERSE:
        turn_sin = -turn_sin

    a = pair * 2 if INTERLEAVED else pair
    b = a + 1 if INTERLEAVED else a + pairs
    there = inside(rows, pair, seqlen, pairs)
    x_a = widen(tl.load(pointers(x, batch, head, rows, a), mask=there, other=0.0))
    x_b = widen(tl.load(pointers(x, batch, head, rows, b), mask=there, other=0.0))
    tl.store(pointers(out, batch, head, rows, a), (x_a * turn_cos - x_b * turn_sin).to(out.ptr.dtype.element_ty), mask=there)
    tl.store(pointers(out, batch, head, rows, b), (x_b * turn_cos + x_a * turn_sin).to(out.ptr.dtype.element_ty), mask=there)

    if REST > 0:
        rest = 2 * pairs + tl.arange(0, REST)
        there = inside(rows, rest, seqlen, head_dim)
        tl.store(pointers(out, batch, head, rows, rest), tl.load(pointers(x, batch, head, rows, rest), mask=there, other=0.0), mask=there)


@triton.jit
def position(positions, offset, batch, rows, seqlen, table):
    """The row of the table for each row of x; whatever was asked for, it is one that the table has."""
    if positions is None:
        wanted = rows.to(tl.int64) + offset
    else:
        at = positions.ptr + tl.cast(batch, tl.int64) * positions.batch + rows.to(tl.int64) * positions.seq
        wanted = tl.load(at, mask=rows < seqlen, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 0), table - 1)


@triton.jit
def pointers(x, batch, head, rows, columns):
    # A transposed tensor can be 2**31 elements from one end of a row to the other, and from one row to the next.
    origin = x.ptr + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    return origin + rows.to(tl.int64)[:, None] * x.seq + columns.to(tl.int64)[None, :] * x.dim
