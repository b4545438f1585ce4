"""The CUDA extension, built once for one architecture: it needs no torch and no driver to be imported, and says why it can't compute."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .test_install import ROOT, build_wheel, copy_tree, names, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux alone"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]
# Unoptimised machine code: nothing of it runs here.
QUICKLY = {"FUSED_ATTENTION_CPU": "0", "FUSED_ATTENTION_CUDA_ARCHS": "80", "NVCC_APPEND_FLAGS": "-Xptxas -O0 -Xcicc -O1"}
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import json, _cuda
count, error, driver, runtime = _cuda.available()
nothing = (0, 2, 0, 0, 0, 0)
tensors, sizes = (nothing, nothing, nothing, nothing, 0, 0, 0), (1, 1, 1, 1, 1, 64, 64, 0, 0, 1.0)
try:
    _cuda.forward(tensors, sizes, (-1, -1, 0, 0, 0, 0, 0, 0), None, 0, 0) if count == 0 else None
    refusal = ""
except RuntimeError as failure:
    refusal = str(failure)
facts = {"architectures": _cuda.ARCHITECTURES, "kernels": _cuda.kernels()}
print(json.dumps(facts | {"count": count, "error": error, "runtime": runtime, "refusal": refusal, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("project") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"), FUSED_ATTENTION_CUDA="1", **QUICKLY)


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in names(wheel) if name.endswith(".so"))
        return Path(archive.extract(name, tmp_path_factory.mktemp("extracted")))


def test_the_wheel_holds_it_and_says_how_it_was_made(wheel: Path) -> None:
    record = zipfile.ZipFile(wheel).read("fused_attention/_build_info.py").decode()
    assert "'architectures': '80'" in record
    assert "'cuda': None" in record
    assert "none-any" not in wheel.name


@pytest.mark.skipif(not shutil.which("readelf"), reason="reads an ELF file with binutils' nm and readelf")
def test_it_needs_neither_torch_nor_a_cuda_runtime_and_shows_no_symbol(library: Path) -> None:
    needed = {line.split("[")[1].partition(".so")[0] for line in run("readelf", "-d", library).splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    shown = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    assert "PyInit__cuda" in shown
    assert not [name for name in shown if name.startswith("cuda") or "forward" in name]


@pytest.fixture(scope="module")
def facts(library: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(sys.executable, "-c", USE, library.parent))
    return found


def test_it_says_which_kernels_it_holds_and_for_which_gpus(facts: dict[str, Any]) -> None:
    """Each kernel that some call launches is one of these, or graph capture would meet it for the first time."""
    assert facts["architectures"] == "80"
    kinds = {name.partition("_kernel<")[0] for name, _, _ in facts["kernels"]}
    launched = {
        kind for path in (ROOT / "csrc" / "cuda").iterdir() for kind in re.findall(r"^(\w+)_kernel\(ARG", path.read_text(), re.MULTILINE)
    }
    assert kinds == launched >= {"forward", "delta", "key", "query"}
    assert all(threads % 32 == 0 and 0 <= shared <= 99 * 1024 for _, threads, shared in facts["kernels"])


def test_it_is_imported_without_a_driver_and_says_why_it_can_not_compute(facts: dict[str, Any]) -> None:
    assert not facts["torch"]
    assert facts["runtime"] >= 12080
    if facts["count"]:
        pytest.skip("this machine has a GPU: tests/gpu computes on it")
    assert facts["error"].startswith("cudaError")
    assert "device 0 cannot be made current" in facts["refusal"] or "did not start: cudaError" in facts["refusal"]


def test_a_demand_that_can_not_be_met_fails_the_install_and_auto_goes_on(tree: Path, tmp_path: Path) -> None:
    nowhere = {"CUDA_HOME": str(tmp_path / "nowhere"), "FUSED_ATTENTION_CPU": "0"}
    failure = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, tree, fails=True, environ=nowhere | {"FUSED_ATTENTION_CUDA": "1"}
    )
    assert "FUSED_ATTENTION_CUDA=1 demands the CUDA extension, but CUDA_HOME is" in failure
    wheel = build_wheel(tree, tmp_path, FUSED_ATTENTION_CUDA="auto", **nowhere)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "where there is no bin/nvcc" in zipfile.ZipFile(wheel).read("fused_attention/_build_info.py").decode()
