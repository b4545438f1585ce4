"""What rounding may do to a result: bounds that follow from the number of operations, with nothing tuned by hand.

u is the unit roundoff of the accumulate dtype, twice float64's for float64, whose truth errs as much as the kernel.
"""

from __future__ import annotations

import math

import torch

from fused_attention.testing.tier1 import SMALLEST, UNIT_ROUNDOFF

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unit(dtype: torch.dtype) -> float:
    return 2 * UNIT_ROUNDOFF[torch.float64] if dtype is torch.float64 else UNIT_ROUNDOFF[torch.float32]


def depth(length: int) -> int:
    """Roundings that a term of a row's sum goes through: 16 one after the other, then a tree, then a block at a time."""
    return 32 + math.ceil(math.log2(length + 1)) + length // 64


def stored(value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error once a value with this error is rounded to its dtype."""
    return error + UNIT_ROUNDOFF[dtype] * (value.abs() + error) + SMALLEST[dtype]


def within(name: str, got: torch.Tensor, truth: torch.Tensor, error: torch.Tensor) -> None:
    """Each element is as near to the truth as its bound says, once it is rounded to its dtype."""
    assert got.shape == truth.shape, f"{name} has shape {tuple(got.shape)}, the truth {tuple(truth.shape)}"
    used = (got.double() - truth).abs() / stored(truth, error, got.dtype)
    assert bool((used <= 1.0).all()), f"{name}: {used.max().item():.3g} of the bound at element {used.argmax().item()}"
    if got.dtype is torch.float64 and got.numel():
        difference = (got - truth).abs().max().item()
        assert difference <= 1e-12 * truth.abs().max().item(), f"{name}: {difference:.3g} from the truth in float64"


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
