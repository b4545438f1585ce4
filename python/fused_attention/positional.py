"""Positions as numbers, without a parameter: sinusoids added to embeddings, and the slopes of ALiBi.

    sinusoid(pos, 2i) = sin(pos / base^(2i / width)),  sinusoid(pos, 2i + 1) = cos(pos / base^(2i / width))
    slope_h = 2^(-8 h / heads),  h = 1 … heads

Sources: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.5; Press et al., 2022, https://arxiv.org/abs/2108.12409
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_positions(
    length: int,
    width: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The encodings of positions offset … offset + length - 1, (length, width): computed in float64 and rounded once.

    Sines stand in the even columns and cosines in the odd ones; an odd width ends with a sine. dtype: default torch's.

    Raises:
        ValueError: a length or an offset below 0, a width below 1 or a base of at most 0.
    """
    for name, number, least in (("length", length, 0), ("width", width, 1), ("offset", offset, 0)):
        if number < least:
            raise ValueError(f"{name} is {number}, expected an int of at least {least}")
    if not base > 0.0:
        raise ValueError(f"base is {base}, expected a number above 0")
    positions = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * base ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / -width)
    columns = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    return columns[:, :width].to(torch.get_default_dtype() if dtype is None else dtype)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slopes (heads,) of ALiBi's paper, for `attention`'s option of this name.

    Where heads is no power of two, those of the next lower one, then every other slope of the next higher one, as in the paper's code.

    Raises:
        ValueError: heads is below 1.
    """
    if heads < 1:
        raise ValueError(f"heads is {heads}, expected an int of at least 1")
    whole = 1 << (heads.bit_length() - 1)
    steps = torch.arange(1, heads + 1, dtype=torch.float64, device=device)
    # Past the power of two, head whole + n takes slope 2n - 1 of a series of 2 · whole.
    steps = torch.where(steps <= whole, steps, steps - whole - 0.5)
    return torch.exp2(steps * (-8.0 / whole)).to(dtype)
