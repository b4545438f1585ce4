"""The analytic bound against values computed by hand, and its counts against tiles counted pair by pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from . import bound, ledger, loops
from .bound import Kernel, Machine, Shape
from .loops import Mix

# The wait for the barrier stands out of line, as ptxas puts it: it jumps back into the loop and is part of it, but no loop around products.
CODE = """
        /*0000*/                   MUFU.EX2 R1, R2 ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_2:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR20], RZ, !UPT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/                   FMNMX R1, R2, R3, !PT ;
        /*0080*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*0090*/                   LDS.128 R4, [R5] ;
        /*00a0*/                   STL [R1], R2 ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/                   FADD R1, R2, R3 ;
        /*00d0*/                   EXIT ;
.L_x_9:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R4 ;
        /*00f0*/              @!P0 BRA `(.L_x_9) ;
        /*0100*/                   BRA `(.L_x_2) ;
.L_x_10:
        /*0110*/                   BRA `(.L_x_10);
"""


def test_the_turn_of_a_loop_is_what_its_instructions_take() -> None:
    assert loops.mixes(CODE) == [
        Mix(
            tensor=32 + 64,  # 64 * 64 * 16 products of 2048 a cycle, then 64 * 128 * 16
            shared=(64 + 64) * 32 // 128 + 128 * 32 // 128 + 4 + 16,  # both operands, the right one, a shuffle, 4 warps of 512 bytes
            mufu=8,  # 32 lanes, 4 a cycle
            fma=1,
            alu=2,
            issue=14,
        )
    ]
    assert [name for _, name, _ in loops.product_loops(CODE)[0]].count("STL") == 1


def test_a_loop_around_a_loop_is_not_counted() -> None:
    nested = CODE.replace("FADD R1, R2, R3 ;", "FADD R1, R2, R3 ;\n        /*00c8*/               @P2 BRA `(.L_x_0) ;")
    nested = nested.replace("MUFU.EX2 R1, R2 ;\n.L_x_1", "MUFU.EX2 R1, R2 ;\n.L_x_0:\n        /*0008*/                   NOP ;\n.L_x_1", 1)
    assert loops.mixes(nested) == loops.mixes(CODE)


def kernel(name: str = "forward", block_m: int = 128, block_n: int = 64, full: Mix | None = None, masked: Mix | None = None) -> Kernel:
    full = full or Mix(tensor=512)  # 2 * 16 rows of 64 keys at head_dim 128, which is what a warp has
    return Kernel(name, block_m, block_n, 8, full, masked or full)


@pytest.mark.parametrize("name", ["forward", "key_value", "query"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(128, 64), (32, 128), (64, 64)])
@pytest.mark.parametrize("seqlen", [256, 300, 31])
def test_tiles_are_counted_as_their_pairs_are_visible(name: str, causal: bool, blocks: tuple[int, int], seqlen: int) -> None:
    """A tile is visited where any pair is visible; it needs the mask where one of its pairs is hidden, missing keys among them."""
    block_m, block_n = blocks
    own, other = (block_n, block_m) if name == "key_value" else blocks
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool)
    seen = (seen.tril() if causal else seen).T if name == "key_value" else (seen.tril() if causal else seen)
    missing = -seqlen % other
    # Rows of a tile past the last one cost nothing more, and queries past it are masked by their lse.
    absent = torch.full((seqlen, missing), name == "key_value")
    expected = []
    for rows in torch.cat([seen, absent], 1).split(own):
        tiles = rows.split(other, 1)
        visited = [tile for tile in tiles if tile[:, : seqlen if missing == 0 else None].any()]
        if causal and name == "key_value":
            visited = tiles[next(at for at, tile in enumerate(tiles) if tile.any()) :]
        full = sum(bool(tile.all()) for tile in visited)
        expected.append((full, len(visited) - full))
    assert list(bound.programs(kernel(name, block_m, block_n), Shape(128, causal, seqlen))) == expected


def test_a_loop_of_products_alone_reaches_the_published_peak() -> None:
    shape = Shape(128, False, 8192)
    found = bound.bound(kernel(), shape, Machine(l2=1e9)._replace(memory=1e15))
    assert found.unit == "tensor"
    assert bound.rate("forward", shape, found.overlapped) == pytest.approx(989, abs=1)


def test_a_bound_by_hand() -> None:
    """2048 keys in 32 tiles, 16 row tiles of 64 heads: 32768 turns of two warps a quarter, spread over 132 SMs."""
    mix = Mix(tensor=512, shared=444, mufu=272, fma=188, alu=198, issue=407)
    found = bound.bound(kernel(full=mix), Shape(128, False, 2048), Machine())
    turns = 32 * 16 * 64 / 132
    shared = turns * (2 * 444 + 2 * 64 * 128 * 2 / 128)  # 32 KiB of k and v a turn
    assert found.unit == "shared"
    assert found.overlapped == pytest.approx(shared / 1.83e9)
    assert found.in_turn == pytest.approx((shared + turns * 2 * 407) / 1.83e9)


def test_the_longest_program_bounds_a_launch_that_leaves_sms_idle() -> None:
    """One key head of 4 tiles, 8 query heads: 4 programs, the first of which visits 16 tiles of 32 queries a head, 4 of them masked."""
    mix, masked = Mix(tensor=512), Mix(tensor=1024)
    found = bound.bound(kernel("key_value", 32, 128, mix, masked), Shape(128, True, 512, heads=8, kv_heads=1), Machine())
    assert found.overlapped == pytest.approx(8 * (12 * 2 * 512 + 4 * 2 * 1024) / 1.83e9)


def test_memory_bounds_what_computes_next_to_nothing() -> None:
    shape = Shape(128, False, 64, batch=4096, heads=8, kv_heads=8)
    found = bound.bound(kernel(full=Mix(tensor=1)), shape, Machine(l2=1e9))
    assert found.unit == "memory"
    rows = 4096 * 8 * 64
    assert found.overlapped == pytest.approx((4 * rows * 128 * 2 + 2 * rows * 4) / 4.8e12)


def test_the_report_puts_figures_beside_each_other(tmp_path: Path) -> None:
    rows = ledger.read(bound.hopper.LEDGER)
    measured = tmp_path / "experiments.json"
    measured.write_text(json.dumps({"cells": [{"name": "d128 causal 4k", "tflops": {"plain": 123.4}}]}))
    for version in ("3.6.0", "3.7.1"):
        text = bound.report(rows, version, Machine(), bound.read_measured(measured)).splitlines()
        at = next(number for number, line in enumerate(text) if line.startswith("128 causal"))
        section = text[at : text.index("", at)]
        assert any(line.split()[:1] == ["forward"] and line.split()[1] == "128x64" for line in section)
        assert any(line.split()[-5:] == ["484", "591", "644", "673", "688"] for line in section)
        assert any(line.split() == ["plain,", "measured", "123"] for line in section)
        assert sum("measured" in line for line in text) == 1


def test_no_bound_is_beyond_the_peak_or_below_what_is_published() -> None:
    """Of the product's kernels; in turn is below the overlapped rate."""
    for name, versions in ledger.read(bound.hopper.LEDGER).items():
        for row in versions.values():
            shape = Shape(int(name.split()[2]), "causal" in name, 16384)
            passed = bound.pass_of(name)
            found = bound.bound(bound.kernel_of(passed, row), shape, Machine())
            assert 100 < bound.rate(passed, shape, found.in_turn) < bound.rate(passed, shape, found.overlapped) < 990, name
