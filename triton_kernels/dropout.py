"""Which attention probabilities dropout keeps: Philox 4x32-10 of the indices alone, so that every pass and tile size agrees.

    key = seed,   counter = (j div 4, i, batch * heads + head, offset mod 2^32),   keep iff word j mod 4 >= floor(p 2^32)

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .options import Options


class Dropout(NamedTuple):
    seed: Any  # int64 (2,): seed, offset
    stride: int
    threshold: int  # a word below it drops
    keep_scale: float  # 1 / (1 - p), what a kept weight is multiplied with


def dropout(options: Options) -> Dropout | None:
    if options.dropout_p == 0 or options.dropout_seed is None:
        return None
    p, seed = options.dropout_p, options.dropout_seed
    # At p = 1 no threshold drops the largest word, but a scale of 0 does.
    return Dropout(seed, seed.stride(0), min(int(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0)


@triton.jit
def factor(dropout, stream, rows, start_n, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """0 or 1 / (1 - p) for rows (ROWS, 1) and keys [start_n, start_n + BLOCK_N) of streams batch * heads + head; None without dropout.

    start_n divides by 4.
    """
    kept = None
    if dropout is not None:
        seed = tl.load(dropout.seed).to(tl.uint64)
        offset = tl.load(dropout.seed + dropout.stride).to(tl.uint32)
        quads = (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
        shape = tl.zeros([rows.shape[0], BLOCK_N // 4], tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, quads + shape, rows.to(tl.uint32) + shape, stream.to(tl.uint32) + shape, offset + shape)
        # The last two axes of the joined words are (j div 2 mod 2, j mod 2).
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([rows.shape[0], BLOCK_N])
        kept = (words >= tl.cast(dropout.threshold, tl.uint32)).to(ACC) * dropout.keep_scale
    return kept


@triton.jit
def transposed_factor(dropout, stream, rows, start_n, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same factors with keys first: (BLOCK_N, ROWS)."""
    kept = factor(dropout, stream, rows, start_n, ACC, BLOCK_N)
    if kept is not None:
        kept = kept.T
    return kept
