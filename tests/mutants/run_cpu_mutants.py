"""Plants every fault of cpu_faults.py in a copy of the C++ kernels, compiles it, and asks its suite of cpu_suites.py whether it notices.

    python -m tests.mutants.run_cpu_mutants [NAME...]        exit status 1 if a fault goes unnoticed

A copy has one table: the baseline's, which runs on every CPU and compiles in seconds, or the one that the damaged code is in.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import fused_attention
from fused_attention import _cpu

from .cpu_faults import FAULTS, Fault
from .cpu_suites import SUITES

PACKAGE = Path(fused_attention.__file__).parent
SOURCES = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ("-O0", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fPIC")
SHARED = ("bindings.cpp", "layer_bindings.cpp", "baseline_double.cpp")
DISPATCH = '#include "cpu/kernels.h"\nconst Kernels& kernels() {{ return {kernels}; }}\n'
TABLES = {
    "baseline": DISPATCH.format(kernels="kBaselineKernels"),
    "avx512_bf16": DISPATCH.format(kernels="kAvx512Bf16Kernels") + "const AttentionKernels kAvx512Double{};\n",  # no double is tried
}
CLEAN = "none"  # the kernels as they are


def compile_one(source: Path, folder: Path, includes: tuple[str, ...] = ()) -> Path:
    target = folder / f"{source.stem}.o"
    command = [str(COMPILER), *FLAGS, f"-I{folder}", *includes, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def copy_sources(folder: Path) -> Path:
    return Path(shutil.copytree(SOURCES, folder / "csrc"))


def compile_shared(folder: Path) -> list[Path]:
    """What no fault changes: the bindings, and the kernels in double."""
    import pybind11

    sources = copy_sources(folder)
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    return [compile_one(sources / "cpu" / name, sources, includes) for name in SHARED]


def build(fault: Fault | None, folder: Path, shared: list[Path]) -> Path:
    """A copy of the package with kernels compiled from patched sources."""
    sources = copy_sources(folder)
    if fault is not None:
        path = sources / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))
    table = "baseline" if fault is None else fault.table
    (sources / "one_table.cpp").write_text(TABLES[table])
    objects = [*shared, compile_one(sources / "cpu" / f"{table}.cpp", sources), compile_one(sources / "one_table.cpp", sources)]
    package = folder / "fused_attention"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    target = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([str(COMPILER), "-shared", "-fopenmp", *map(str, objects), "-o", str(target)], check=True, capture_output=True)
    return folder


def judge(suites: set[str], copy: Path) -> str | None:
    """The first check that fails on a copy, or None."""
    return next((verdict for suite in sorted(suites) if (verdict := SUITES[suite](copy)) is not None), None)


def verdicts(names: list[str], jobs: int) -> Iterator[tuple[str, str | None, float]]:
    """Of every fault, and of none: what noticed it, and after how many seconds; in the order in which they end."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        root = Path(folder).resolve()
        shared = compile_shared(root / "shared")

        def verdict(name: str) -> tuple[str, str | None, float]:
            started = time.monotonic()
            copy = build(FAULTS.get(name), root / name, shared)
            suites = {FAULTS[each].suite for each in (names if name == CLEAN else [name])}
            return name, judge(suites, copy), time.monotonic() - started

        for done in as_completed([pool.submit(verdict, name) for name in (CLEAN, *names)]):
            yield done.result()


def runs(table: str) -> bool:
    """Whether this CPU has the instructions; says so where it does not."""
    isa = _cpu.isa()
    able = table in ("baseline", isa)
    if not able:
        print(f"left out: faults in the kernels for {table}, for this CPU runs those for {isa}")
    return able


def complaint(name: str, verdict: str | None) -> str | None:
    """What is wrong with the suite or with the fault, or None."""
    if name == CLEAN:
        return None if verdict is None else f"the kernels themselves fail: {verdict}"
    if verdict is None:
        return f"{name} is not noticed: {FAULTS[name]}"
    arithmetic = "bounds" in verdict or "AssertionError" in verdict
    return None if arithmetic else f"{name} is no fault of arithmetic: {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(FAULTS)
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    names = [name for name in arguments.names or FAULTS if runs(FAULTS[name].table)]
    found: dict[str, str | None] = {}
    for name, verdict, seconds in verdicts(names, arguments.jobs):
        found[name] = verdict
        print(f"{seconds:6.1f} s  {name}: {(verdict or 'nothing').splitlines()[0][:150]}", flush=True)
    complaints = [text for name, verdict in found.items() if (text := complaint(name, verdict))]
    print(*complaints, sep="\n")
    print(f"{sum(found[name] is not None for name in names)} of {len(names)} faults noticed")
    return int(bool(complaints))


if __name__ == "__main__":
    raise SystemExit(main())
