"""The kernels under NVIDIA's compute-sanitizer: accesses outside an allocation, races in shared memory, barriers not all threads reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .target import Target

SCRIPT = Path(__file__).with_name("sanitized.py")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
PROBE = "import torch; print(torch.zeros(8, device='cuda').sum().item())"
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    "synccheck": "ERROR SUMMARY: 0 errors",
}
PROBE_SECONDS, RUN_SECONDS = 60, 180


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).exists()), None)
    return found or pytest.skip("compute-sanitizer is not on this machine")


def watched(tool: str, *arguments: str, seconds: int) -> subprocess.CompletedProcess[str]:
    """Runs Python under a tool; without PyTorch's caching, which would hide accesses outside a tensor inside a larger block."""
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "99", sys.executable, *arguments]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("tool", CLEAN)
def test_the_tool_has_nothing_to_say(tool: str, gpu: Target) -> None:
    probe = watched(tool, "-c", PROBE, seconds=PROBE_SECONDS)
    if probe.returncode or "0.0" not in probe.stdout:
        lines = [line for line in (probe.stdout + probe.stderr).splitlines() if line.startswith("=========") and len(line) > 12]
        pytest.skip(f"{tool} does not work on this machine: {' '.join(lines[:2]) or f'exit status {probe.returncode}'}")
    run = watched(tool, str(SCRIPT), "cuda", gpu.backend, seconds=RUN_SECONDS)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-3000:]
    assert "problems ran" in output
    assert CLEAN[tool] in output, output[-3000:]
