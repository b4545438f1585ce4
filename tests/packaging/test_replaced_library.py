"""A build gives its result a new file: processes that have the last one loaded keep it, whatever the next build writes."""

from __future__ import annotations

import importlib
import mmap
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("setuptools", reason="the build needs setuptools")
pytest.importorskip("pybind11", reason="the build needs pybind11")
pytest.importorskip("ninja", reason="the build needs ninja")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no part is compiled on Windows, where a mapped file cannot be replaced")


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    return {part: importlib.import_module(f"build_tools.{part}_extension") for part in ("cpu", "cuda")}


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_a_build_leaves_the_file_that_others_have_loaded(extensions, part, tmp_path, monkeypatch):
    """Ten processes of the GPU run load one library; copied over in place, it ended those that had it."""
    extension, made, target = extensions[part], tmp_path / "made.so", tmp_path / "out" / "library.so"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extension, "make", lambda *arguments: made)
    if part == "cuda":
        toolkit = importlib.import_module("build_tools.cuda_toolkit").Toolkit(Path("nvcc"), tmp_path, tmp_path, (13, 0), "13.0")
        monkeypatch.setattr(extension, "find_toolkit", lambda from_packages: toolkit)
    monkeypatch.setattr(
        extension, "find_compiler", lambda: importlib.import_module("build_tools.cpu_extension").Compiler(("c++",), "c++ 1")
    )
    compile_part = getattr(extension, f"compile_{part}")

    made.write_bytes(b"first" * 2000)
    compile_part(["x.cpp"], target, tmp_path / "objects")
    before = target.stat().st_ino
    with target.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held:
        made.write_bytes(b"2nd")
        compile_part(["x.cpp"], target, tmp_path / "objects")
        assert target.stat().st_ino != before
        assert target.read_bytes() == b"2nd"
        assert held[:] == b"first" * 2000
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]
