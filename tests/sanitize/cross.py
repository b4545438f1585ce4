"""`make cross`: compiles the extension for machines that are not at hand, with zig's clang in build/ziglang/venv.

Without OpenMP, which zig does not bring: what differs between machines are the vectors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from build_tools.cpu_extension import FLAGS, cpu_extension

ZIG = (str(Path("build/ziglang/venv/bin/python").absolute()), "-m", "ziglang", "c++")
FOLDER = Path("build/cross")
TARGETS = ("aarch64-linux-gnu", "aarch64-macos")


def compile_for(target: str, source: Path) -> str:
    """What the compiler has to say, nothing if all is well."""
    made = FOLDER / target / f"{source.stem}.o"
    made.parent.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in FLAGS if flag != "-fopenmp"]
    includes = ["-Icsrc", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    command = [*ZIG, "-target", target, *flags, *includes, "-Werror", "-c", str(source), "-o", str(made)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return f"{target}: {source} does not compile\n{run.stdout}" if run.returncode else ""


def main() -> int:
    # Python.h tells its size of integers by the machine that it was made for: the same on all of these.
    work = [(target, Path(source)) for target in TARGETS for source in cpu_extension().sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [complaint for complaint in pool.map(compile_for, *zip(*work, strict=True)) if complaint]
    print("\n".join(complaints) or f"{len(work) // len(TARGETS)} sources compile for {', '.join(TARGETS)}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
