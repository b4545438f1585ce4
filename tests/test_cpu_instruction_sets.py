"""Every table of C++ CPU kernels that this machine can run passes the tests of the widest one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .cpu_calls import compiled

FILES = ("test_cpu_formula.py", "test_cpu_promises.py", "test_cpu_pairs.py", "test_cpu_decode.py", "test_matrix.py")


@compiled
class TestInstructionSets:
    @staticmethod
    def isa(wanted: str) -> subprocess.CompletedProcess[str]:
        from fused_attention import _cpu

        # By its path: the module needs no torch, whose import takes seconds.
        script = "import sys; sys.path[:0] = sys.argv[1:]; import _cpu; print(_cpu.isa())"
        environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": wanted}
        command = [sys.executable, "-c", script, str(Path(_cpu.__file__).parent)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
    def test_every_table(self, isa):
        answer = self.isa(isa)
        if answer.returncode:
            pytest.skip(f"this CPU has no {isa}: {answer.stderr.splitlines()[-1]}")
        assert answer.stdout.strip() == isa
        from fused_attention import _cpu

        if isa == _cpu.isa():
            pytest.skip(f"{isa} is what the other tests run on")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--import-mode=importlib",
            *(str(Path(__file__).parent / name) for name in FILES),
            "-k",
            "test_cpu and not fork or equals_the_oracle and cpu",
        ]
        environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": isa}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:]

    def test_unknown_name(self):
        answer = self.isa("avx1024")
        assert answer.returncode == 1
        assert "RuntimeError: FUSED_ATTENTION_CPU_ISA is 'avx1024', and this CPU can run" in answer.stderr
        assert "baseline: name one of these, or unset the variable" in answer.stderr
