"""When the build makes an object anew, and which compiler with which flags it calls: on sources of a line, in a folder of their own."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

pytest.importorskip("setuptools", reason="the build needs setuptools")
pytest.importorskip("pybind11", reason="the build needs pybind11")
pytest.importorskip("ninja", reason="the build needs ninja")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux alone"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_ARCHS", "80")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host.cpp").write_text("int host() { return 1; }\n")
    (tmp_path / "device.cu").write_text("__global__ void kernel() {}\n")
    return importlib.import_module("build_tools.cuda_extension")


def made(compile_part, *sources: str) -> dict[str, int]:
    """Compiles the sources; when each object was written."""
    compile_part(list(sources), Path("out/library.so"), Path("objects"))
    return {path.name: path.stat().st_mtime_ns for path in Path("objects").glob("*.o")}


def wrapper(path: Path, command: str, version: str) -> Path:
    """A compiler that calls another one and says that it is of this version."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else exec {command} "$@"; fi\n')
    path.chmod(0o755)
    return path


def test_another_compiler_in_the_same_place_makes_the_objects_anew(tools, tmp_path, monkeypatch):
    """No command changes where a system's update replaces g++, and a dependency file leaves out the system's headers."""
    from build_tools.cpu_extension import compile_cpu

    monkeypatch.setenv("CXX", str(wrapper(tmp_path / "bin" / "c++", "g++", "c++ 1")))
    first = made(compile_cpu, "host.cpp")
    assert made(compile_cpu, "host.cpp") == first
    wrapper(tmp_path / "bin" / "c++", "g++", "c++ 2")
    assert made(compile_cpu, "host.cpp") != first


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_flags_that_nvcc_reads_from_the_environment_make_the_objects_anew(tools, monkeypatch):
    """Kernels compiled without optimisation once stayed when the variable that had asked for that was gone."""
    first = made(tools.compile_cuda, "device.cu")
    assert made(tools.compile_cuda, "device.cu") == first
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas -O0")
    assert made(tools.compile_cuda, "device.cu") != first


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_calls_the_compiler_of_cxx_behind_a_launcher_and_with_its_flags(tools, tmp_path, monkeypatch):
    """`ccache g++` once gave nvcc ccache for a compiler, and flags in CXX and CXXFLAGS were lost."""
    monkeypatch.setenv("CXX", "env LAUNCHED=1 g++ -DONE=1 -Wl,-O1")
    monkeypatch.setenv("CXXFLAGS", "-DTWO=2")
    checks = "static_assert(ONE == 1 && TWO == 2);\nconst char* made_for() { return FUSED_ATTENTION_ARCHITECTURES; }\n"
    Path("host.cpp").write_text(checks)
    Path("device.cu").write_text("#ifndef __CUDA_ARCH__\nstatic_assert(ONE == 1 && TWO == 2);\n#endif\n__global__ void kernel() {}\n")
    monkeypatch.setenv("LDFLAGS", "-Wl,-soname,named_in_ldflags")
    facts = tools.compile_cuda(["device.cu", "host.cpp"], Path("out/library.so"), Path("objects"))
    assert "TWO" in facts["flags"]
    assert b"named_in_ldflags" in Path("out/library.so").read_bytes()


@pytest.mark.parametrize(
    ("command", "compiler", "flags"),
    [
        (("g++",), "g++", ()),
        (("ccache", "g++"), "g++", ()),
        (("distcc", "ccache", "/opt/bin/c++", "-m64", "-I", "x"), "/opt/bin/c++", ("-m64", "-I", "x")),
    ],
)
def test_the_compiler_behind_a_launcher(tools, command, compiler, flags):
    from build_tools.cpu_extension import Compiler

    assert Compiler(command, "").launched == (compiler, flags)
