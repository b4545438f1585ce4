"""What a copy of the package with other C++ kernels is put through: each suite gives the first thing that fails, or None.

attention    quick_suite.py
layers       the tests of their kernels
memory       hostile tables of pages, every tensor against unreadable memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK = HERE / "quick_suite.py"
LAYERS = ("-k", "sizes or rows or widths or strides or rotation or gated", "tests/test_layer_ops_linear.py", "tests/test_layer_ops_norm.py")
AGAINST_UNREADABLE = """
from tests.sanitize.problems import hostile_pages
from tests.sanitize.sweep import check
for problem in hostile_pages():
    check(problem, [1], "end")
"""


def attention(copy: Path) -> str | None:
    verdict: str | None = json.loads(run(copy, str(QUICK), str(copy)).stdout)[str(copy)]
    return verdict


def layers(copy: Path) -> str | None:
    done = run(copy, "-m", "pytest", "-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *LAYERS)
    return None if done.returncode == 0 else failure(done.stdout, "E  ")


def memory(copy: Path) -> str | None:
    done = run(copy, "-c", AGAINST_UNREADABLE)
    if done.returncode < 0:
        return f"out of bounds: signal {-done.returncode}"
    return None if done.returncode == 0 else failure(done.stderr, "")


SUITES: Mapping[str, Callable[[Path], str | None]] = {"attention": attention, "layers": layers, "memory": memory}


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False, capture_output=True, text=True, env=environment)


def failure(report: str, mark: str) -> str:
    """The first marked line of a report, or the last line there is."""
    lines = report.strip().splitlines()
    return next((line for line in lines if mark and line.startswith(mark)), lines[-1] if lines else "no word")
