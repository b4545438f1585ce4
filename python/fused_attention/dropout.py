"""Which attention probabilities dropout keeps: Philox 4x32-10, a function of the indices alone.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (j div 4, i, batch * heads + head, offset mod 2^32)
    keep (i, j) iff word j mod 4 of philox(counter, key) >= floor(p * 2^32)

so forward, backward and recomputation agree without storing a mask, whatever the tiles and the backend.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def new_seed(device: torch.device) -> Tensor:
    """A fresh (seed, offset) from the device's default generator, without waiting for the device."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device=device)


def keep(seed: Tensor, stream: Tensor, rows: Tensor, cols: Tensor, dropout_p: float, first: int | None) -> Tensor:
    """True where (i, j) = (rows, cols) of a stream (batch * heads + head) is kept; the three int64 tensors broadcast.

    first: cols is first, first + 1, ... in its last dimension, and first a multiple of 4; None: any columns, at 4 times the cost.
    """
    key = seed[0] & WORD, (seed[0] >> 32) & WORD
    if first is None:
        words = _philox((cols >> 2, rows, stream, seed[1] & WORD), key)
        word = torch.stack(words, dim=-1).gather(-1, (cols & 3).expand_as(words[3])[..., None])[..., 0]
    else:
        words = _philox((cols[..., ::4] >> 2, rows, stream, seed[1] & WORD), key)
        word = torch.stack(words, dim=-1).flatten(-2)[..., : cols.shape[-1]]
    return word >= int(dropout_p * 2**32)


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product; int64 wraps around, which leaves the 64 bits as they are."""
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD
