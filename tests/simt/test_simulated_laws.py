"""Values that break attention, and laws of gradients, on the simulated GPU; other shared tests: python -m tests.simt.shared."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .simulation import ROOT

SHARED = ("tests/test_adversarial.py", "tests/test_gradient_laws.py")


@pytest.mark.slow
def test_the_shared_tests_pass(compiled):
    command = (sys.executable, "-m", "tests.simt.shared", "--library", str(compiled.library), "--dtype", "bfloat16", *SHARED)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
