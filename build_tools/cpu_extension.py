"""Compiles csrc/cpu/*.cpp into fused_attention._cpu with g++ or clang++ under ninja: no torch, and no -march.

One object for each source, remade when the source, one of its headers or the command changes:

    c++ FLAGS -Icsrc -c csrc/cpu/x.cpp -o x.o        c++ -shared -fopenmp *.o -o _cpu.so
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension
from setuptools.errors import CompileError

# No -march: one binary holds a table for each instruction set and picks at load.
# No -ffast-math: g++ 12 would link crtfastmath, which flushes denormals in the whole process.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-fPIC")
LINK_FLAGS = ("-fopenmp", "-s")


class Compiler(NamedTuple):
    """How to call a C++ compiler, and the first line of its --version."""

    command: tuple[str, ...]
    version: str


def cpu_extension() -> Extension:
    """The extension with paths relative to the project; the headers are named so that a source distribution carries them."""
    headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)
    return Extension("fused_attention._cpu", sorted(glob("csrc/cpu/*.cpp")), depends=sorted(headers), language="c++")


def find_compiler() -> Compiler:
    """$CXX, else the first of g++, clang++ and c++ on PATH."""
    if sys.platform == "win32":
        raise CompileError("the C++ sources use the vector extensions of g++ and clang++, and no such build exists for Windows yet")
    asked = shlex.split(os.environ.get("CXX", ""))
    command = asked or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not command:
        raise CompileError("no C++ compiler was found: install g++ or clang++, or name one in CXX, and install fused-attention again")
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the C++ compiler {shlex.join(command)} does not run ({error}): correct CXX, or unset it") from error
    return Compiler(tuple(command), answer.stdout.splitlines()[0])


def compile_cpu(
    sources: list[str], target: Path, folder: Path, flags: tuple[str, ...] = FLAGS, link_flags: tuple[str, ...] = LINK_FLAGS
) -> dict[str, str]:
    """Makes `target` from `sources` with objects under `folder`; returns what was used, raises CompileError with the compiler's message."""
    import pybind11

    compiler = find_compiler()
    flags = (*flags, *shlex.split(os.environ.get("CXXFLAGS", "")))
    link_flags = (*link_flags, *shlex.split(os.environ.get("LDFLAGS", "")))
    folder.mkdir(parents=True, exist_ok=True)
    # An isolated build finds pybind11 in a new place each time; behind a link the commands, and so the objects, stay valid.
    pybind = Path(f"pybind11-{pybind11.__version__}")
    (folder / pybind).unlink(missing_ok=True)
    (folder / pybind).symlink_to(pybind11.get_include(), target_is_directory=True)
    (folder / "build.ninja").write_text(_ninja_file(sources, compiler, flags, link_flags, pybind, folder))
    jobs = f"-j{os.cpu_count() or 1}"
    made = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(folder), jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(made.stdout, flush=True)
    if made.returncode:
        errors = [line for line in made.stdout.splitlines() if "error" in line] or made.stdout.splitlines()[-1:]
        raise CompileError(f"the C++ sources do not compile with {compiler.version}: {errors[0] if errors else 'ninja says nothing'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(folder / "_cpu.so", target)
    return {"compiler": compiler.version, "flags": shlex.join(flags), "pybind11": pybind11.__version__}


def _ninja_file(
    sources: list[str], compiler: Compiler, flags: tuple[str, ...], link_flags: tuple[str, ...], pybind: Path, folder: Path
) -> str:
    """The text of build.ninja; its paths are relative to `folder`."""
    from ninja.ninja_syntax import escape, escape_path

    root = os.path.relpath(".", folder)
    includes = [f"-I{root}/csrc", "-isystem", str(pybind), "-isystem", sysconfig.get_paths()["include"]]
    link = ["-shared", *link_flags]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    cxx = escape(shlex.join(compiler.command))
    # -MMD leaves out system headers, whose dates an isolated build renews.
    lines = [
        "rule compile",
        f"  command = {cxx} {escape(shlex.join([*flags, *includes]))} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in {escape(shlex.join(link))} -o $out",
    ]
    objects = [f"{Path(source).stem}.o" for source in sources]
    lines += [f"build {escape_path(out)}: compile {escape_path(f'{root}/{source}')}" for out, source in zip(objects, sources, strict=True)]
    lines += [f"build _cpu.so: link {' '.join(map(escape_path, objects))}", ""]
    return "\n".join(lines)
