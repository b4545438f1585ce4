"""How many instructions the tile of a CUDA kernel takes, from its sizes alone: each one more is work, each one fewer a result.

    a product adds 16 x 8 x 32 bytes to a warp's 16 rows, of float32 three do
    a load brings four matrices of 8 rows of 16 bytes, a copy 16 bytes

What stands in the kernel once counts once, however often a loop repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

BYTES = {"BFloat16": 2, "Float16": 2, "Float32": 4}
# Stages of q and dout, or of k and v, that the text of a kernel copies: the first one, and the next one in its loop.
TEXTS = 2


class Counts(NamedTuple):
    products: int
    loads: int
    transposed: int  # of the loads
    copies: int | None  # None: of a loop that the compiler unrolls as it likes


def expected(name: str) -> Counts | None:
    """Of a kernel such as forward_kernel<ForwardConfig<BFloat16, 64, 128, 64, 4, false>>; None where nothing is known."""
    if re.fullmatch(r"(delta|combine)_kernel<\w+>|slope_kernel<SlopeConfig>", name):
        return Counts(0, 0, 0, 0)
    found = re.fullmatch(r"(\w+)_kernel<\w+<(\w+), ([\d, ]+)(?:, (?:true|false))?>>", name)
    if found is None or found[1] not in KERNELS:
        return None
    return KERNELS[found[1]](BYTES[found[2]], *map(int, found[3].split(", ")))


def forward(size: int, head_dim: int, queries: int, keys: int, warps: int) -> Counts:
    """q k^T with q by fragments of 16 rows, and p v."""
    fragments = queries // 16 // warps
    right = loads(size, keys, head_dim)
    transposed = right if size == 2 else 0
    return Counts(
        2 * products(size, 16 * fragments, keys, head_dim),
        fragments * loads(size, 16, head_dim) + right + transposed,
        transposed,
        copies(size, queries + 3 * keys, head_dim, warps),
    )


def key(size: int, head_dim: int, queries: int, keys: int, stages: int, split: int) -> Counts:
    """k q^T and v dout^T, then p^T dout and ds^T q in the columns of one part."""
    columns = head_dim // split
    transposed = 2 * loads(size, queries, columns) if size == 2 else 0
    return Counts(
        2 * products(size, 16, queries, head_dim) + 2 * products(size, 16, columns, queries),
        2 * loads(size, 16, head_dim) + 2 * loads(size, queries, head_dim) + transposed,
        transposed,
        copies(size, 2 * keys + TEXTS * 2 * queries, head_dim, keys // 16),
    )


def query(size: int, head_dim: int, queries: int, keys: int, stages: int) -> Counts:
    """q k^T and dout v^T, then ds k."""
    transposed = loads(size, keys, head_dim) if size == 2 else 0
    return Counts(
        3 * products(size, 16, keys, head_dim),
        2 * loads(size, 16, head_dim) + 2 * loads(size, keys, head_dim) + transposed,
        transposed,
        copies(size, 2 * queries + TEXTS * 2 * keys, head_dim, queries // 16),
    )


def bias(size: int, head_dim: int, queries: int, keys: int) -> Counts:
    """q k^T and dout v^T."""
    return Counts(
        2 * products(size, 16, keys, head_dim),
        2 * loads(size, 16, head_dim) + 2 * loads(size, keys, head_dim),
        0,
        copies(size, 2 * queries + 2 * keys, head_dim, queries // 16),
    )


def split(size: int, head_dim: int, warps: int) -> Counts:
    """q k^T and p v of 16 queries and 16 keys."""
    transposed = loads(size, 16, head_dim) if size == 2 else 0
    return Counts(2 * products(size, 16, 16, head_dim), 2 * loads(size, 16, head_dim) + transposed, transposed, None)


KERNELS: dict[str, Callable[..., Counts]] = {"forward": forward, "key": key, "query": query, "bias": bias, "split": split}


def products(size: int, rows: int, columns: int, summed: int) -> int:
    return rows * columns * summed * size // (16 * 8 * 32) * (3 if size == 4 else 1)


def loads(size: int, rows: int, columns: int) -> int:
    return rows * columns * size // (4 * 8 * 16)


def copies(size: int, rows: int, columns: int, warps: int) -> int:
    """Of one thread."""
    return rows * columns * size // 16 // (32 * warps)
