"""The compiled CUDA kernels against theory and the ledger: products, loads, copies, spills and shared memory, without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton brings the disassembler")

from . import cuda_code, cuda_ledger, cuda_theory
from .cuda_code import Cost

GOOD = Cost(128, 33024, 237, 2, 8, 4, 2, 128, 40, 16, 20, 3952)
NAME = "sm_80 forward_kernel<ForwardConfig<BFloat16, 64, 128, 64, 4, false>>"


@pytest.fixture(scope="module")
def ledger() -> cuda_ledger.Ledger:
    return cuda_ledger.read()


@pytest.mark.slow
@pytest.mark.skipif(cuda_code.missing() is not None, reason=f"the CUDA kernels can't be compiled here: {cuda_code.missing()}")
def test_kernels_cost_what_the_ledger_says() -> None:
    command = [sys.executable, "-m", "tests.codegen.cuda_ledger", "--architecture", "sm_80", "--type", "bfloat16"]
    run = subprocess.run(command, cwd=cuda_code.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_row_of_the_ledger_is_what_theory_says(ledger: cuda_ledger.Ledger) -> None:
    for rows in ledger.values():
        assert {name.split()[0] for name in rows} == set(cuda_ledger.ARCHITECTURES)
        for name, cost in rows.items():
            theory = cuda_theory.expected(name.split(" ", 1)[1])
            assert theory is not None, name
            assert all(number in (None, getattr(cost, column)) for column, number in theory._asdict().items()), name
            assert cost.shared <= cuda_ledger.MOST_SHARED, name
            assert cost.blocks >= 1, name


def test_the_ledger_holds_the_same_kernels_for_every_architecture(ledger: cuda_ledger.Ledger) -> None:
    for rows in ledger.values():
        kernels = [{name.split(" ", 1)[1] for name in rows if name.startswith(f"{each} ")} for each in cuda_ledger.ARCHITECTURES]
        assert kernels[0]
        assert all(names == kernels[0] for names in kernels)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"products": 129}, "129 products, and its tile takes 128"),
        ({"loads": 41}, "41 loads, and its tile takes 40"),
        ({"copies": 19}, "19 copies, and its tile takes 20"),
        ({"stack": 16}, "16 bytes of stack, before 8"),
        ({"spills": 5}, "5 loads and stores of a thread's own memory, before 4"),
        ({"loop_spills": 3}, "3 of them inside a loop, before 2"),
        ({"shared": 33025}, "33025 bytes of shared memory, before 33024"),
        ({"shared": 99 * 1024 + 1}, "cannot be launched"),
        ({"blocks": 1}, "1 blocks at once on a multiprocessor, before 2"),
        ({"threads": 256}, "256 threads, before 128"),
    ],
)
def test_a_row_that_got_worse_is_told(changed: dict[str, int], expected: str) -> None:
    assert any(expected in sentence for sentence in cuda_ledger.complaints(NAME, GOOD._replace(**changed), GOOD))


def test_a_row_that_got_better_passes_and_an_unknown_or_lost_one_does_not() -> None:
    better = GOOD._replace(stack=0, spills=0, loop_spills=0, registers=100, blocks=4, instructions=1)
    assert cuda_ledger.judged({NAME: better}, {NAME: GOOD}, whole=True) == []
    assert "no such row" in cuda_ledger.judged({NAME: GOOD}, {}, whole=True)[0]
    lost = NAME.replace("BFloat16", "Float16")
    assert cuda_ledger.judged({NAME: GOOD}, {NAME: GOOD, lost: GOOD}, whole=False) == []
    assert "no such kernel is compiled any more" in cuda_ledger.judged({NAME: GOOD}, {NAME: GOOD, lost: GOOD}, whole=True)[0]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"products": 129}, "129 products, and its tile takes 128"),
        ({"spills": 7}, "7 loads and stores of a thread's own memory, before 6"),
        ({"loop_spills": 4}, "4 of them inside a loop, before 3"),
        ({"shared": 99 * 1024 + 1}, "cannot be launched"),
    ],
)
def test_of_an_unknown_release_theory_and_the_most_spills_hold(changed: dict[str, int], expected: str) -> None:
    """Each of its rows was once one that the ledger had not."""
    known = {"12.9": {NAME: GOOD._replace(spills=6)}, "13.0": {NAME: GOOD._replace(loop_spills=3)}}
    other = GOOD._replace(spills=6, loop_spills=3, registers=255, blocks=1, stack=24, shared=33025, instructions=9999)
    bad, against = cuda_ledger.verdict(known, "13.4", {NAME: other}, whole=True)
    assert bad == []
    assert "knows nvcc 12.9, 13.0" in against
    assert any(expected in sentence for sentence in cuda_ledger.verdict(known, "13.4", {NAME: other._replace(**changed)}, whole=True)[0])
    assert cuda_ledger.verdict(known, "13.0", {NAME: other}, whole=True)[0]
    lost = NAME.replace("BFloat16", "Float16")
    assert "no such row" in cuda_ledger.verdict(known, "13.4", {lost: other}, whole=False)[0][0]


def test_without_a_compiler_the_command_says_that_it_checked_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_code, "missing", lambda: "nvcc is not on PATH")
    monkeypatch.setattr(sys, "argv", ["cuda_ledger"])
    assert cuda_ledger.main() == 0
    assert capsys.readouterr().err.startswith("NOTHING WAS CHECKED: ")


def test_the_machine_code_of_a_kernel_is_counted() -> None:
    code = """
        /*0000*/                   STL [R1], R2 ;
.L_x_1:
        /*0010*/                   LDL R2, [R1] ;
.L_x_2:
        /*0020*/                   LDSM.16.MT88.4 R4, [R3] ;
        /*0030*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0090*/                   LDL R3, [R1] ;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_3:
"""
    found = cuda_code.cost("sm_80", 128, 33024, 168, 8, code)
    assert found == Cost(128, 33024, 168, 3, 8, spills=4, loop_spills=2, products=1, loads=2, transposed=1, copies=1, instructions=11)


@pytest.mark.parametrize(
    ("architecture", "shared", "registers", "blocks"),
    [
        ("sm_80", 0, 32, 16),
        ("sm_80", 0, 168, 3),
        ("sm_80", 0, 169, 2),
        ("sm_80", 98304, 168, 1),
        ("sm_90", 98304, 168, 2),
        ("sm_120", 50 * 1024, 32, 1),
    ],
)
def test_how_many_blocks_a_multiprocessor_runs(architecture: str, shared: int, registers: int, blocks: int) -> None:
    assert cuda_code.blocks(architecture, 128, shared, registers) == blocks


@pytest.mark.parametrize(
    "written",
    [
        "void forward_kernel<(anonymous namespace)::ForwardConfig<BFloat16, 64, 128, 64, 4, false> >(AttentionParams)",
        "forward_kernel<_GLOBAL__N__9ac1dc6b_11_bfloat16_cu_09495ef4::ForwardConfig<BFloat16, 64, 128, 64, 4, false> >",
        "&forward_kernel<ForwardConfig<BFloat16, 64, 128, 64, 4, false>>",
    ],
)
def test_one_kernel_has_one_name(written: str) -> None:
    assert cuda_code.plain(written) == NAME.split(" ", 1)[1]
