"""Sinusoidal positions and ALiBi's slopes against the formulas of their papers, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from fused_attention.positional import alibi_slopes, sinusoidal_positions


@pytest.mark.parametrize(
    ("length", "width", "offset", "base"), [(5, 8, 0, 10000.0), (3, 7, 0, 10000.0), (4, 1, 9, 2.0), (2, 512, 100_000, 10000.0)]
)
def test_each_column_is_the_sine_or_cosine_of_the_paper(length, width, offset, base) -> None:
    got = sinusoidal_positions(length, width, offset=offset, base=base, dtype=torch.float64)
    assert got.shape == (length, width)
    for row in range(length):
        for column in range(width):
            angle = (row + offset) / base ** ((column - column % 2) / width)
            # The angle itself is rounded: a unit in its last place moves the sine by as much.
            assert got[row, column].item() == pytest.approx(
                math.sin(angle) if column % 2 == 0 else math.cos(angle), abs=1e-15 * (1 + angle)
            )


def test_rounded_once_to_the_type_asked_for() -> None:
    exact = sinusoidal_positions(64, 32, dtype=torch.float64)
    assert torch.equal(sinusoidal_positions(64, 32), exact.float())
    assert torch.equal(sinusoidal_positions(64, 32, dtype=torch.bfloat16), exact.bfloat16())
    assert sinusoidal_positions(0, 4).shape == (0, 4)
    assert sinusoidal_positions(3, 4, device="meta").is_meta


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"length": -1}, "length is -1, expected an int of at least 0"),
        ({"width": 0}, "width is 0, expected an int of at least 1"),
        ({"offset": -2}, "offset is -2, expected an int of at least 0"),
        ({"base": 0.0}, r"base is 0\.0, expected a number above 0"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        sinusoidal_positions(**{"length": 2, "width": 4, **wrong})


def published(heads: int) -> list[float]:
    """The rule of the paper's code: a geometric series of a power of two, filled up from the next one."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return published(closest) + published(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20, 31, 64, 71])
def test_slopes_are_those_published(heads) -> None:
    assert alibi_slopes(heads, dtype=torch.float64).tolist() == pytest.approx(published(heads), rel=1e-14)
    assert alibi_slopes(heads).dtype is torch.float32


def test_slopes_of_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="heads is 0, expected an int of at least 1"):
        alibi_slopes(0)
