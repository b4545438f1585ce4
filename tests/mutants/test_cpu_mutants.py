"""Faults planted in the C++ kernels: each still applies, and one of each kind is noticed; `make mutants` plants them all."""

from __future__ import annotations

import os

import pytest

from . import run_cpu_mutants
from .cpu_faults import FAULTS

# Of the forward and of the backward pass.
FEW = ["row-sum-not-rescaled", "softcap-not-differentiated"]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    """What noticed each of the few, by name; "none" is the kernels as they are."""
    if run_cpu_mutants.COMPILER is None:
        pytest.skip("g++ is not on PATH")
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork, and a process for each fault would take minutes")
    return {name: verdict for name, verdict, _ in run_cpu_mutants.verdicts(FEW, jobs=1)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_kernels_is_planted_exactly_once(name):
    fault = FAULTS[name]
    found = (run_cpu_mutants.SOURCES / fault.file).read_text().count(fault.old)
    assert found == 1, f"{fault.file} no longer holds exactly once: {fault.old}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [run_cpu_mutants.CLEAN, *FEW])
def test_a_fault_in_the_kernels_is_noticed(name, verdicts):
    assert run_cpu_mutants.complaint(name, verdicts[name]) is None
