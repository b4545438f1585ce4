"""Faults planted in the Triton kernels: each still applies, and one of each kind is noticed; `make mutants` plants them all.

A fault is a textual patch that must apply exactly once: when the code moves on, the fault has to be planted anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .kernel_faults import FAULTS, SURVIVORS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "fused_attention"

# Of a mask, the tiles it hides, a range of tiles, a rescaling, an address, a gradient and the host.
FEW = (
    "visible-right-off-by-one",
    "turns-past-the-range",
    "keys-full-right-off-by-one",
    "acc-not-rescaled",
    "columns-taken-for-contiguous",
    "delta-omitted",
    "grid-too-small",
)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    """What noticed each of the few, by name; "none" is the kernels as they are."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it belongs to the [triton] extra")
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork, and a process for each fault would take minutes")
    command = [sys.executable, "-m", "tests.mutants.run_kernel_mutants", "--json", *FEW]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_triton_kernels_is_planted_exactly_once(name):
    fault = FAULTS[name]
    folder = ROOT if fault.file.startswith("triton_kernels/") else PACKAGE
    assert (folder / fault.file).read_text().count(fault.old) == 1, f"{fault.file} no longer holds exactly once: {fault.old}"


def test_there_are_enough_faults_and_few_survive():
    assert len(FAULTS) >= 80
    assert set(SURVIVORS) <= set(FAULTS)
    assert len(SURVIVORS) <= 0.05 * len(FAULTS)


@pytest.mark.slow
def test_the_triton_kernels_themselves_pass(verdicts):
    assert verdicts["none"] is None, verdicts["none"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_fault_in_the_triton_kernels_is_noticed(name, verdicts):
    assert verdicts[name] is not None, f"nothing noticed {FAULTS[name]}"
    assert verdicts[name].startswith(f"{FAULTS[name].noticed_by}: "), f"something else noticed it: {verdicts[name]}"
