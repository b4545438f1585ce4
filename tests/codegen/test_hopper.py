"""What the kernels for sm_90 cost, the experiments beside the product's: no loop spills, nothing is serialized, products overlap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from . import hopper, ledger

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.6.0", "3.7.1")
COMPILED = ("64 plain s_ahead_forward", "64 plain warp_specialized_forward ping-pong")
# One register a turn of 1536 cycles; with 32 queries a tile, shared memory would be busy half as long again.
RELOADED = {("sm_90 bfloat16 256 plain tma_key_value", "3.7.1"): 1}


@pytest.fixture(scope="module")
def rows() -> ledger.Rows:
    return ledger.read(hopper.LEDGER)


@pytest.mark.slow
def test_experiments_cost_what_was_recorded() -> None:
    command = [sys.executable, "-m", "tests.codegen.hopper", "--only", *COMPILED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 kernels" in run.stdout


def test_every_kernel_is_recorded_under_both_versions_and_no_other(rows: ledger.Rows) -> None:
    assert sorted(rows) == sorted(name for name, _, _ in hopper.kernels())
    assert {name: sorted(versions) for name, versions in rows.items()} == {name: sorted(VERSIONS) for name in rows}


@pytest.mark.parametrize("version", VERSIONS)
def test_no_main_loop_spills_and_nothing_is_serialized(rows: ledger.Rows, version: str) -> None:
    for name, versions in rows.items():
        costs = versions[version].costs
        assert (costs["loop_spills"], costs["serialized"]) == (RELOADED.get((name, version), 0), 0), name
        assert costs["shared"] <= hopper.LIMIT, name
        assert costs["products"] > 2 * costs["waits"] > 0, name
        assert bool(costs["bulk_copies"]) == any(word in name for word in ("ahead", "specialized", "tma")), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", hopper.OPTIONS)
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_experiments_take_exponentials_beside_products(rows: ledger.Rows, head_dim: int, options: str, version: str) -> None:
    """The plain forward never does within a group of warps, nor, as ptxas orders it, the loop ahead at head_dim 256."""
    point = f"sm_90 bfloat16 {head_dim} {options}"
    plain, ahead, *specialized = (
        rows[f"{point} {name}"][version].costs["covered"]
        for name in ("forward", "s_ahead_forward", "warp_specialized_forward", "warp_specialized_forward ping-pong")
    )
    assert all(beside == 0 for beside, _ in plain)
    assert head_dim == 256 or max(beside / every for beside, every in ahead) > 0.9
    assert all(beside == every > 0 for loops in specialized for beside, every in loops)
