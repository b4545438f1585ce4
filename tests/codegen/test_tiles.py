"""The table of tiles: every pass of every architecture has one, of sizes that a kernel can be compiled for."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has one tile for all", allow_module_level=True)

from fused_attention.triton_kernels import tiles

ARCHITECTURES = (
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "sm_121",
    "sm_200",
    "gfx90a",
    "gfx942",
    "gfx950",
    "interpreter",
)
PASSES = ("forward", "decode", "delta", "dq", "dbias")
LEAST_SUMMED = 16  # elements that a product must sum over


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pass_has_a_tile_of_powers_of_two(architecture: str, itemsize: int) -> None:
    for head_dim in range(1, 513):
        split = tiles.splits_key_value(architecture, head_dim, itemsize)
        for name in (*PASSES, *(("dk", "dv") if split else ("dkv",))):
            tile = tiles.choose(architecture, name, head_dim, itemsize, "tf32x3")
            assert all(size & (size - 1) == 0 for size in tile[:3]), (name, head_dim, tile)
            if name in ("dkv", "dk", "dv"):
                assert tile.block_m >= LEAST_SUMMED, (name, head_dim, tile)
            elif name in ("forward", "decode", "dq"):
                assert tile.block_n >= LEAST_SUMMED, (name, head_dim, tile)


@pytest.mark.parametrize(
    ("architecture", "like"),
    [("sm_86", "sm_120"), ("sm_89", "sm_120"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_200", "sm_120"), ("gfx950", "gfx942")],
)
def test_an_unknown_architecture_takes_tiles_that_fit_it(architecture: str, like: str) -> None:
    for head_dim in (64, 128, 256, 512):
        assert tiles.choose(architecture, "forward", head_dim, 2, "tf32x3") == tiles.choose(like, "forward", head_dim, 2, "tf32x3")


@pytest.mark.parametrize(
    ("architecture", "head_dim", "itemsize", "asked", "expected"),
    [
        ("sm_90", 128, 4, "tf32x3", "tf32x3"),
        ("sm_90", 129, 4, "tf32x3", "ieee"),
        ("sm_90", 129, 4, "tf32", "tf32"),
        ("sm_90", 256, 2, "tf32x3", "tf32x3"),
        ("gfx942", 64, 2, "tf32x3", "ieee"),
    ],
)
def test_precision_is_one_the_architecture_has_and_can_hold(
    architecture: str, head_dim: int, itemsize: int, asked: str, expected: str
) -> None:
    assert tiles.choose(architecture, "forward", head_dim, itemsize, asked).precision == expected
