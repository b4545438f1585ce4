"""Rotary position embedding: each pair of a row's elements turns by an angle that grows with the row's position.

    out_a = x_a · cos - x_b · sin,  out_b = x_b · cos + x_a · sin,    angle = position · frequency_i,  frequency_i = base^(-2i / dim)

so that q · k depends on the distance of their positions alone. Scaled frequencies let a model read further than it was trained.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .layer_ops import rotate
from .validation import INDEX_DTYPES


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | int | None = None, interleaved: bool = False) -> Tensor:
    """x with the first 2 · pairs elements of each row turned by the angles of the row's position; what lies past them is copied.

    Computed in float32 (float64 for float64) and rounded once. Differentiable in x, cos and sin; x is not modified.

    Args:
        x: (batch, heads, seqlen, head_dim), float16, bfloat16, float32 or float64, any strides. Packed rows (total, heads, head_dim)
            go in as x.transpose(0, 1)[None], with positions (1, total).
        cos, sin: (table, pairs), pairs at most head_dim // 2: of every position and pair, floating; `Rotary.tables` makes them.
        positions: of each row, int32 or int64, (batch, seqlen) or (seqlen,), one outside the table counting as its nearest end;
            or the position of the first row, an int. Default: 0.
        interleaved: pair i is (x_{2i}, x_{2i + 1}), as in RoFormer and GPT-J, instead of (x_i, x_{i + pairs}), as in GPT-NeoX and Llama.

    Returns:
        A tensor of x's shape and dtype, laid out as torch.empty_like(x).

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence names it, what it got and what was expected.
    """
    _check(x, cos, sin, positions, interleaved)
    if isinstance(positions, Tensor):
        row = positions.clamp(0, cos.shape[0] - 1)
        return rotate(x, cos[row], sin[row], interleaved=interleaved)
    first = positions or 0
    rows = slice(first, first + x.shape[2])
    return rotate(x, cos[rows], sin[rows], interleaved=interleaved)


class Tables(NamedTuple):
    """cos and sin of (position, pair), times the scaling's amplitude."""

    cos: Tensor
    sin: Tensor


class Scaling(ABC):
    """Other frequencies than the base's, for sequences longer than those trained on."""

    @abstractmethod
    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        """The scaled frequencies; frequencies: (pairs,), float64, base^(-i / pairs)."""

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Positions divided by factor: frequency / factor (Chen et al., 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1.0)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    """A larger base, base · factor^(dim / (dim - 2)): the highest frequency stays, the lowest is divided by factor.

    Source: bloc97, "NTK-Aware Scaled RoPE", 2023; equation 16 of https://arxiv.org/abs/2309.00071
    """

    factor: float

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1.0)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        pairs = frequencies.shape[0]
        # frequency_i · factor^(-i / (pairs - 1)); the single pair of a dim of 2 has the highest frequency.
        return frequencies * self.factor ** (-_indices(frequencies) / max(pairs - 1, 1))


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN: frequencies of few turns within original_length are divided by factor, those of many stay, a ramp lies between.

    slow_turns and fast_turns are the ends of the ramp (the paper's alpha and beta); amplitude, which the weights' temperature needs,
    is 0.1 ln(factor) + 1 unless given.

    Source: Peng et al., "YaRN", 2023, https://arxiv.org/abs/2309.00071; the ramp's ends are whole pairs, as in its code.
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1.0)
        _check_number("original_length", self.original_length, 1)
        _check_number("slow_turns", self.slow_turns, 1e-9)
        _check_number("fast_turns", self.fast_turns, self.slow_turns)
        if self.attention_factor is not None:
            _check_number("attention_factor", self.attention_factor, 1e-9)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        dim = 2 * frequencies.shape[0]

        def pair_of(turns: float) -> float:
            """The pair, a fraction, that makes so many turns within original_length."""
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(pair_of(self.fast_turns)), 0)
        last = min(math.ceil(pair_of(self.slow_turns)), dim - 1)
        width = last - first if last != first else 0.001  # a step, without dividing by 0
        divided = ((_indices(frequencies) - first) / width).clamp(0.0, 1.0)
        return frequencies * (1.0 - divided + divided / self.factor)

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1: wavelengths past original_length / low_freq_factor are stretched by factor, those below / high_freq_factor stay.

    Between them the divisor goes smoothly from the one to the other.

    Source: Llama team, "The Llama 3 Herd of Models", 2024, https://arxiv.org/abs/2407.21783, and its reference code.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_number("factor", self.factor, 1.0)
        _check_number("original_length", self.original_length, 1)
        _check_number("low_freq_factor", self.low_freq_factor, 1e-9)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}, low_freq_factor {self.low_freq_factor}: the first must be the larger one"
            )

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        turns = frequencies * (self.original_length / (2 * math.pi))  # within original_length
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


@dataclass(frozen=True)
class Rotary:
    """What turns the queries and keys of a layer: `MultiHeadAttention(..., rotary=Rotary(base=500000.0, scaling=Llama3Scaling()))`.

    base: of the frequencies, above 1. dim: how many elements of each head turn, even; None is all of them.
    interleaved: as in `apply_rotary`. offset: the position of the first row, of queries and of keys.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    offset: int = 0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        _check_number("base", self.base, 1.0)
        if self.base == 1.0:
            raise ValueError("base is 1.0: all frequencies would be alike, expected a number above 1")
        if self.dim is not None and (not _is_int(self.dim) or self.dim < 2 or self.dim % 2):
            raise ValueError(f"dim is {self.dim!r}, expected an even int of at least 2, or None for the whole head")
        if not _is_int(self.offset) or self.offset < 0:
            raise ValueError(f"offset is {self.offset!r}, expected an int of at least 0: the position of the first row")
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"interleaved is {self.interleaved!r}, expected True or False")
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            raise TypeError(f"scaling is {self.scaling!r}, expected a Scaling such as LinearScaling or YarnScaling, or None")

    def pairs(self, head_dim: int) -> int:
        """How many pairs of a head's elements turn; a ValueError where the head is too small or cannot be paired."""
        dim = head_dim if self.dim is None else self.dim
        if dim > head_dim or dim % 2:
            raise ValueError(f"rotary turns {dim} elements of a head_dim of {head_dim}: give Rotary an even dim of at most {head_dim}")
        return dim // 2

    def frequencies(self, head_dim: int, *, device: torch.device | str | None = None) -> Tensor:
        """Radians a position of each pair, (pairs,), float64."""
        pairs = self.pairs(head_dim)
        frequencies = self.base ** (torch.arange(pairs, dtype=torch.float64, device=device) / -max(pairs, 1))
        return frequencies if self.scaling is None else self.scaling.apply(frequencies, self.base)

    def tables(self, length: int, head_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tables:
        """cos and sin of `length` positions from `offset` on, each (length, pairs): computed in float64 and rounded once."""
        # At position 100000 a float32 product would be off by a hundredth of a radian.
        positions = torch.arange(self.offset, self.offset + length, dtype=torch.float64, device=device)
        angles = positions[:, None] * self.frequencies(head_dim, device=device)
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        return Tables((angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype))


def _indices(frequencies: Tensor) -> Tensor:
    return torch.arange(frequencies.shape[0], dtype=frequencies.dtype, device=frequencies.device)


def _is_int(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _check_number(name: str, number: float, least: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number < math.inf:
        raise ValueError(f"{name} is {number!r}, expected a finite number of at least {least}")


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | int | None, interleaved: bool) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise TypeError(f"{name} is {got}, expected a floating tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move it with {name}.to(x.device)")
    if x.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (batch, heads, seqlen, head_dim); packed rows go in as x.transpose(0, 1)[None]"
        )
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected (table, pairs) of both")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"cos has {cos.shape[1]} pairs, a head_dim of {x.shape[-1]} has at most {x.shape[-1] // 2}: shorten cos and sin")
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved is {interleaved!r}, expected True or False")
    _check_positions(positions, x, cos.shape[0])


def _check_positions(positions: Tensor | int | None, x: Tensor, table: int) -> None:
    batch, _, seqlen, _ = x.shape
    if isinstance(positions, Tensor):
        if positions.dtype not in INDEX_DTYPES:
            raise TypeError(f"positions is {positions.dtype}, expected int32 or int64: convert it with .to(torch.int64)")
        if positions.device != x.device:
            raise ValueError(f"positions is on {positions.device}, x on {x.device}: move it with positions.to(x.device)")
        if tuple(positions.shape) not in ((seqlen,), (batch, seqlen)):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}, expected ({seqlen},) or ({batch}, {seqlen}): one for every row"
            )
        if table == 0 and x.numel() > 0:
            raise ValueError("cos has no rows: give one for every position")
        return
    if positions is not None and (isinstance(positions, bool) or not isinstance(positions, (int, torch.SymInt))):
        raise TypeError(f"positions is {positions!r}, expected an int tensor, the int position of the first row, or None for 0")
    first = 0 if positions is None else positions
    if first < 0 or first + seqlen > table:
        raise ValueError(
            f"rows stand at positions {first} to {first + seqlen - 1}, cos and sin have positions 0 to {table - 1}: make longer tables"
        )
