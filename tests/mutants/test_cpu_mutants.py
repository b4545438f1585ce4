"""Faults planted in the C++ kernels: each is compiled in a copy, the table for every CPU alone, and must be noticed.

A fault is a textual patch that must apply exactly once: when the code moves on, the fault has to be planted anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

import fused_attention

PACKAGE = Path(fused_attention.__file__).parent
SOURCES = Path(__file__).parents[2] / "csrc"
SUITE = Path(__file__).parent / "quick_suite.py"
COMPILER = shutil.which("g++")
FLAGS = ("-O1", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
SHARED = ("bindings.cpp", "layer_bindings.cpp", "baseline_double.cpp")
DISPATCH = '#include "cpu/kernels.h"\nconst Kernels& kernels() { return kBaselineKernels; }\n'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES.is_dir(), reason="the C++ sources are in a source checkout only"),
    pytest.mark.skipif(COMPILER is None, reason="g++ is not on PATH"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork, and a process for each fault would take minutes"),
]


class Fault(NamedTuple):
    file: str
    old: str
    new: str


FAULTS: dict[str, Fault] = {
    "last-visible-key-hidden": Fault("cpu/mask.inl", "(hi[n] > key)", "(hi[n] > key + 1)"),
    "one-key-too-many": Fault("cpu/mask.inl", "(hi[n] > key)", "(hi[n] >= key)"),
    "first-visible-key-hidden": Fault("cpu/mask.inl", "(lo[n] <= key)", "(lo[n] < key)"),
    "top-left": Fault("mask.h", "end - m.seqlen_q", "0 * end"),
    "row-sum-not-rescaled": Fault("cpu/softmax.inl", "fused(row_sum[n], rescale[n], tile_sum[n])", "row_sum[n] + tile_sum[n]"),
    "acc-not-rescaled": Fault("cpu/forward.inl", "fused(load(at), rescale[n], x)", "load(at) + x"),
    "empty-row-guard-removed": Fault("cpu/softmax.inl", "highest == -kInfinity ? Vec{} : highest", "highest"),
    "lse-in-base-2": Fault(
        "cpu/softmax.inl", "lse[n] = fused(row_max[n], broadcast(kLn2), ", "lse[n] = fused(row_max[n], broadcast(1.0f), "
    ),
    "hidden-values-enter": Fault("cpu/forward.inl", "if (tile.guarded)", "if (false)"),
    "wrong-head-of-a-group": Fault("cpu/query_block.inl", "kv_head * group + index / per_head", "kv_head + index / per_head * p.kv_heads"),
    "delta-dropped": Fault("cpu/backward.inl", "* (x - delta[n])", "* x"),
    "scale-omitted-in-dk": Fault("cpu/backward.inl", "dk, dk_row, Real(p.scale), adds)", "dk, dk_row, Real(1), adds)"),
    "group-of-heads-not-summed": Fault("cpu/backward.inl", "before = adds ?", "before = false ?"),
    "hidden-weights-in-backward": Fault(
        "cpu/backward.inl", "const bool masked = !common.contains({j, j + height});", "const bool masked = false;"
    ),
    "mask-ignored": Fault("cpu/pairs.inl", "load(spare + at) != Real(0)", "load(spare + at) != Real(2)"),
    "softcap-not-differentiated": Fault("cpu/pair_block.inl", "ds * steepness", "ds"),
    "dropout-missing-in-backward": Fault("cpu/pair_block.inl", "if (p.dropout_seed) load_dropout();", "if (false) load_dropout();"),
    "bias-gradient-of-the-last-keys-alone": Fault("cpu/backward.inl", "bias_sums[i] += of_options", "bias_sums[i] = of_options"),
    "ranges-of-keys-not-rescaled": Fault("cpu/decode.inl", "broadcast(before[r]), x)", "broadcast(Real(1)), x)"),
    "packed-keys-of-queries": Fault("mask.h", "clamp(p.cu_seqlens_k[batch], 0,", "clamp(p.cu_seqlens_q[batch], 0,"),
    "last-key-block-skipped": Fault("cpu/forward.inl", "start_n < keys.hi;", "start_n + kBlockN < keys.hi + 1;"),
}


def compile_one(source: Path, folder: Path, includes: tuple[str, ...] = ()) -> Path:
    target = folder / f"{source.stem}.o"
    command = [str(COMPILER), *FLAGS, f"-I{folder}", *includes, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def copy_sources(folder: Path) -> Path:
    """csrc without its own wish for -O3, which costs more time here than it saves."""
    sources: Path = shutil.copytree(SOURCES, folder / "csrc")
    path = sources / "cpu" / "kernels.inl"
    path.write_text(path.read_text().replace('#pragma GCC optimize("O3")', ""))
    return sources


def compile_shared(folder: Path) -> list[Path]:
    """What no fault changes: the bindings, and the kernels in double."""
    import pybind11

    sources = copy_sources(folder)
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    return [compile_one(sources / "cpu" / name, sources, includes) for name in SHARED]


def build(fault: Fault | None, folder: Path, shared: list[Path]) -> None:
    """A copy of the package with kernels compiled from patched sources."""
    sources = copy_sources(folder)
    if fault is not None:
        path = sources / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
    (sources / "one_table.cpp").write_text(DISPATCH)
    objects = [*shared, compile_one(sources / "cpu" / "baseline.cpp", sources), compile_one(sources / "one_table.cpp", sources)]
    package = folder / "fused_attention"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    target = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([str(COMPILER), "-shared", "-fopenmp", *map(str, objects), "-o", str(target)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str | None]:
    """The first failure of every copy, by the name of its fault; "none" is the package as it is."""
    root = tmp_path_factory.mktemp("cpu-mutants").resolve()
    shared = compile_shared(root / "shared")
    for name, fault in {"none": None, **FAULTS}.items():
        build(fault, root / name, shared)
    copies = [str(root / name) for name in ("none", *FAULTS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(SUITE), *copies], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return {Path(copy).name: verdict for copy, verdict in json.loads(result.stdout).items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_kernels_is_planted_exactly_once(name):
    fault = FAULTS[name]
    assert (SOURCES / fault.file).read_text().count(fault.old) == 1, f"{fault.file} no longer holds exactly once: {fault.old}"


def test_the_kernels_themselves_pass(verdicts):
    assert verdicts["none"] is None, verdicts["none"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_kernels_is_noticed(name, verdicts):
    verdict = verdicts[name]
    assert verdict is not None, f"nothing noticed {FAULTS[name]}"
    assert "bounds" in verdict or "AssertionError" in verdict, f"the fault is not one of arithmetic: {verdict}"
