"""What the GPU run does without a compiler, with sources that don't compile, and in the processes that find the kernels made."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_attention import cuda_backend

from . import cuda_module

DEVICE = torch.device("cuda", 0)

pytest.importorskip("setuptools", reason="the build needs setuptools")
pytest.importorskip("fcntl", reason="the processes of a run wait for each other by a lock of Unix")


@pytest.fixture
def build_tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(cuda_module.ROOT))
    return lambda name: importlib.import_module(f"build_tools.{name}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A GPU with a compiler beside it, whose library turns the backend on; a list of what was done there."""
    done: list[str] = []
    monkeypatch.setattr(cuda_module, "FOLDER", tmp_path)
    monkeypatch.setattr(cuda_module, "LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda_module, "MADE_OF", tmp_path / "made-of.txt")
    monkeypatch.setattr(cuda_module, "no_compiler", lambda: None)
    monkeypatch.setattr(cuda_module, "load", lambda: done.append("load"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_backend.CudaBackend, "unavailable", lambda self: None if "load" in done else "it is missing")
    return done


@pytest.fixture
def compiled(machine: list[str], monkeypatch: pytest.MonkeyPatch, build_tools: Callable[[str], Any]) -> list[str]:
    """The same, with a compiler that writes a file."""

    def compile_cuda(sources: list[str], target: Path, folder: Path) -> None:
        machine.append("compile")
        target.write_text("a library")

    monkeypatch.setattr(build_tools("cuda_extension"), "compile_cuda", compile_cuda)
    return machine


def test_no_compiler_is_a_reason_to_skip(monkeypatch: pytest.MonkeyPatch, build_tools: Callable[[str], Any]) -> None:
    monkeypatch.setattr(cuda_backend.CudaBackend, "unavailable", lambda self: "it is missing")

    def absent(from_packages: bool) -> None:
        raise build_tools("cuda_toolkit").CompileError("nvcc was not found: put it on PATH")

    for needed in ("ninja", "pybind11"):  # which an isolated build brings, and this machine may lack
        monkeypatch.setitem(sys.modules, needed, ModuleType(needed))
    monkeypatch.setattr(build_tools("cuda_toolkit"), "find_toolkit", absent)
    reason = cuda_module.provide(DEVICE)
    assert reason is not None
    assert reason.startswith("the CUDA kernels can't be compiled here: nvcc was not found")


def test_sources_that_do_not_compile_are_a_failure(
    machine: list[str], monkeypatch: pytest.MonkeyPatch, build_tools: Callable[[str], Any]
) -> None:
    """Every step of the kernels was skipped, and the run held."""
    error = build_tools("cuda_toolkit").CompileError

    def broken(*arguments: object) -> None:
        raise error("the CUDA sources do not compile with nvcc 13.0")

    monkeypatch.setattr(build_tools("cuda_extension"), "compile_cuda", broken)
    with pytest.raises(error, match="do not compile"):
        cuda_module.provide(DEVICE)


def test_a_library_that_does_not_load_is_a_failure(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol: kernel")

    monkeypatch.setattr(cuda_module, "load", broken)
    with pytest.raises(ImportError, match="undefined symbol"):
        cuda_module.provide(DEVICE)


@pytest.mark.parametrize("driver", [12040, 13000])
def test_a_library_that_finds_no_gpu_is_a_failure_unless_the_compiler_is_too_new(
    compiled: list[str], driver: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_backend.CudaBackend, "unavailable", lambda self: "the NVIDIA driver has no GPU for it")
    module = type("Module", (), {"available": staticmethod(lambda: (0, "why", driver, 13000))})
    monkeypatch.setattr(cuda_backend, "_module", lambda: module)
    if driver < 13000:
        assert cuda_module.provide(DEVICE) == "the NVIDIA driver has no GPU for it"
    else:
        with pytest.raises(RuntimeError, match="the backend is off: the NVIDIA driver has no GPU for it"):
            cuda_module.provide(DEVICE)


def test_one_process_compiles_and_the_others_load(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once compiled for itself. Other sources are compiled, and so is what the beginning of a run has deleted."""
    assert cuda_module.provide(DEVICE) is None
    compiled.clear()
    assert cuda_module.provide(DEVICE) is None
    assert compiled == ["load"]
    cuda_module.LIBRARY.unlink()
    cuda_module.build("90")
    assert compiled == ["load", "compile"]
    cuda_module.build("100")
    assert compiled == ["load", "compile", "compile"]
    monkeypatch.setattr(cuda_module, "sources_of", lambda architecture: "other sources")
    cuda_module.build("100")
    assert compiled == ["load", "compile", "compile", "compile"]


def test_the_number_of_the_sources_follows_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "ROOT", tmp_path)
    header = tmp_path / "csrc" / "cuda" / "tile.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("1")
    first = cuda_module.sources_of("90")
    assert first == cuda_module.sources_of("90") != cuda_module.sources_of("80")
    header.write_text("2")
    assert cuda_module.sources_of("90") != first
