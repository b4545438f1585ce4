"""The simulated GPU sees what it should: faults that leave the numbers right, or nearly; the whole list runs under `make mutants`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .faults import FAULTS, QUICK
from .simulation import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_planted_exactly_once(name):
    path = ROOT / "csrc" / "cuda" / FAULTS[name].file
    if not path.exists():
        pytest.skip("the CUDA sources are in a source checkout only")
    assert path.read_text().count(FAULTS[name].old) == 1


def test_faults_are_noticed(compiled):
    """In a process without threads, which forks: `compiled` only says that this machine can."""
    command = (sys.executable, "-m", "tests.simt.mutants", *QUICK)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
