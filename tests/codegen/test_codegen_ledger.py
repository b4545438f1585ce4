"""The compiled kernels against the ledger: registers, spills, shared memory and tensor-core use, without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from . import build, ledger, points, record

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.6.0", "3.7.1")


@pytest.fixture(scope="module")
def rows() -> ledger.Rows:
    return ledger.read()


@pytest.mark.slow
def test_default_kernels_cost_what_the_ledger_says() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.codegen.ledger", "--default"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_ledger_holds_every_kernel_under_both_versions_and_no_other(rows: ledger.Rows) -> None:
    assert sorted(rows) == sorted(name for name, _, _ in ledger.kernels(points.points()))
    assert {name: sorted(versions) for name, versions in rows.items()} == {name: sorted(VERSIONS) for name in rows}


def test_no_row_needs_more_than_a_block_has(rows: ledger.Rows) -> None:
    for name, versions in rows.items():
        for row in versions.values():
            assert row.costs["shared"] <= build.SHARED_LIMITS[name.split()[0]], name
            assert row.costs["tensor_memory"] <= build.TENSOR_MEMORY, name
            assert row.costs["atomics"] == 0, name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", ["plain", "causal"])
@pytest.mark.parametrize("kernel", ["forward", "query"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_hopper_forward_and_dq_are_free_of_spills_and_overlap_their_wgmma(
    rows: ledger.Rows, head_dim: int, kernel: str, options: str, version: str
) -> None:
    costs = rows[f"sm_90 bfloat16 {head_dim} {options} {kernel}"][version].costs
    assert (costs["spills"], costs["serialized"]) == (0, 0)
    assert costs["products"] > 2 * costs["waits"] > 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("head_dim", points.HEAD_DIMS)
def test_no_hopper_loop_spills_or_serializes_without_options(rows: ledger.Rows, head_dim: int, version: str) -> None:
    found = {name: row[version].costs for name, row in rows.items() if name.startswith(f"sm_90 bfloat16 {head_dim} causal ")}
    assert len(found) >= 4  # forward, delta, dq, dkv or dk and dv
    assert {name: (costs["loop_spills"], costs["serialized"]) for name, costs in found.items()} == dict.fromkeys(found, (0, 0))


GOOD = ledger.Row("64x64 w4 s2", build.Cost(registers=128, spills=4, loop_spills=0, shared=65536, products=24, waits=4)._asdict())


def worse(**costs: int) -> ledger.Row:
    return GOOD._replace(costs=GOOD.costs | costs)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (worse(spills=5), "5 local loads and stores, before 4"),
        (worse(loop_spills=1), "1 local loads and stores in a loop, before 0"),
        (worse(shared=65537), "65537 bytes of shared memory, before 65536"),
        (worse(shared=99 * 1024 + 1), "cannot be launched"),
        (worse(tensor_memory=513), "cannot be launched"),
        (worse(serialized=1), "serializes its wgmma"),
        (worse(products=0), "no products on tensor cores"),
        (worse(atomics=1), "1 atomics"),
        (GOOD._replace(tile="32x64 w4 s2"), "tile 32x64 w4 s2, in the ledger 64x64 w4 s2"),
    ],
)
def test_a_row_that_got_worse_is_told(row: ledger.Row, expected: str) -> None:
    assert any(expected in sentence for sentence in ledger.complaints("a kernel", row, GOOD, limit=99 * 1024))


def test_a_row_that_got_better_passes_and_an_unknown_one_does_not() -> None:
    assert list(ledger.complaints("a kernel", worse(spills=0, registers=64, shared=1), GOOD, limit=99 * 1024)) == []
    assert list(ledger.complaints("a kernel", GOOD, GOOD, limit=99 * 1024)) == []
    assert "no such row" in next(ledger.complaints("a kernel", GOOD, None, limit=99 * 1024))


def test_a_compiler_that_dies_or_fails_is_told() -> None:
    def die(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("no such instruction")

    launch = record.Launch(kernel=None, arguments=(), options={"num_warps": 4, "num_stages": 1})
    told = {}
    for name, warmup in (("dies", die), ("fails", fail)):
        kernel = type("Kernel", (), {"warmup": staticmethod(warmup)})
        told |= dict(ledger.compile_all([(name, "sm_90", launch._replace(kernel=kernel))], jobs=1))
    assert "ended its process with status" in told["dies"]
    assert told["fails"] == "ValueError: no such instruction"


def test_spills_are_counted_in_the_innermost_loop() -> None:
    code = """
.L_x_1:
        /*0010*/ STL [R1], R2 ;
.L_x_2:
        /*0020*/ LDL R2, [R1] ;
        /*0030*/ @P0 BRA `(.L_x_2) ;
        /*0040*/ @P1 BRA `(.L_x_1) ;
        /*0050*/ LDL R3, [R1] ;
        /*0060*/ BRA `(.L_x_3) ;
.L_x_3:
"""
    assert build.count(build.SPILL, code) == 3
    assert [build.count(build.SPILL, loop) for loop in build.innermost_loops(code)] == [1]
