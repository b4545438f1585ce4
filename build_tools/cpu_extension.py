"""Compiles csrc/cpu/*.cpp into fused_attention._cpu with g++ or clang++ under ninja: no torch, and no -march.

One object for each source, remade when the source, one of its headers, the command or the compiler changes:

    c++ FLAGS -Icsrc -c csrc/cpu/x.cpp -o x.o        c++ -shared -fopenmp *.o -o _cpu.so
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.errors import CompileError

from build_tools.ninja import command, include_flags, make, place, pybind_version

# No -march: one binary holds a table for each instruction set and picks at load.
# No -ffast-math: g++ 12 would link crtfastmath, which flushes denormals in the whole process.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-fPIC")
LINK_FLAGS = ("-fopenmp", "-s")


class Compiler(NamedTuple):
    """How to call a C++ compiler, and the first line of its --version."""

    command: tuple[str, ...]
    version: str

    @property
    def launched(self) -> tuple[str, tuple[str, ...]]:
        """The compiler itself, which in CXX may follow a launcher, as g++ does in `ccache g++ -m64`, and the flags after it."""
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), self.command))
        return words[-1], self.command[len(words) :]


def cpu_extension() -> Extension:
    """The extension with paths relative to the project; the headers are named so that a source distribution carries them."""
    headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)
    return Extension("fused_attention._cpu", sorted(glob("csrc/cpu/*.cpp")), depends=sorted(headers), language="c++")


def find_compiler() -> Compiler:
    """$CXX, else the first of g++, clang++ and c++ on PATH."""
    if sys.platform == "win32":
        raise CompileError("the C++ sources use the vector extensions of g++ and clang++, and no such build exists for Windows yet")
    asked = shlex.split(os.environ.get("CXX", ""))
    found = asked or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not found:
        raise CompileError("no C++ compiler was found: install g++ or clang++, or name one in CXX, and install fused-attention again")
    try:
        answer = subprocess.run([*found, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the C++ compiler {shlex.join(found)} does not run ({error}): correct CXX, or unset it") from error
    return Compiler(tuple(found), answer.stdout.splitlines()[0])


def compile_cpu(
    sources: list[str], target: Path, folder: Path, flags: tuple[str, ...] = FLAGS, link_flags: tuple[str, ...] = LINK_FLAGS
) -> dict[str, str]:
    """Makes `target` from `sources` with objects under `folder`; returns what was used, raises CompileError with the compiler's message."""
    compiler = find_compiler()
    flags = (*flags, *shlex.split(os.environ.get("CXXFLAGS", "")))
    link_flags = (*link_flags, *shlex.split(os.environ.get("LDFLAGS", "")))
    link = ["-shared", *link_flags]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    # -MMD leaves out system headers, whose dates an isolated build renews.
    rules = {
        "compile": f"{command(*compiler.command, *flags, *include_flags(folder))} -MMD -MF $out.d -c $in -o $out",
        "link": f"{command(*compiler.command)} $in {command(*link)} -o $out",
    }
    objects = {f"{Path(source).stem}.o": (source, "compile") for source in sources}
    library = make(folder, rules, objects, "_cpu.so", compiler.version, f"the C++ sources do not compile with {compiler.version}")
    place(library, target)
    return {"compiler": compiler.version, "flags": shlex.join(flags), "pybind11": pybind_version()}
