"""Compiles csrc/cuda into fused_attention._cuda: the kernels by nvcc, the binding by the C++ compiler, under ninja; no torch.

    nvcc FLAGS -gencode ... -c x.cu -o x.o        c++ FLAGS -c y.cpp -o y.o        c++ -shared *.o -lcudart_static -o _cuda.so

FUSED_ATTENTION_CUDA_ARCHS names the architectures to compile for, as 80+PTX,90; +PTX: for later ones too, by the driver.
CXX, CXXFLAGS and LDFLAGS steer what the C++ compiler does, nvcc's calls of it included; NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS, nvcc.
"""

from __future__ import annotations

import os
import re
import shlex
from glob import glob
from pathlib import Path

from setuptools import Extension

from build_tools.cpu_extension import find_compiler
from build_tools.cuda_toolkit import find_toolkit
from build_tools.ninja import command, include_flags, make, place, pybind_version
from build_tools.switches import switch

# What is compiled for sm_80 also runs on 86, 87 and 89, and its PTX on whatever comes later.
ARCHITECTURES = "80+PTX,90,100,120"
OLDEST = 80  # with copies from global to shared memory that nobody waits for
# The front end, half of the work, runs once for all that share its answers: it treats 90 as it does 80, and 120 as it does 100.
FRONT_ENDS = (100, 80)
# --threads: more assemblers at a time than sources.
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=4", "-Xfatbin=-compress-all")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-g0")
# Static and hidden: beside torch's own runtime there is a second one, and neither may see the other's symbols.
LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-s", "-Wl,--exclude-libs,ALL")


def cuda_extension() -> Extension:
    """The extension with paths relative to the project; the headers are named so that a source distribution carries them."""
    headers = [path for kind in ("h", "inl", "cuh") for path in glob(f"csrc/**/*.{kind}", recursive=True)]
    return Extension("fused_attention._cuda", sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")), depends=sorted(headers))


def compile_cuda(sources: list[str], target: Path, folder: Path) -> dict[str, str]:
    """Makes `target` from `sources` with objects under `folder`; returns what was used, raises CompileError with the compiler's message."""
    architectures = (os.environ.get("FUSED_ATTENTION_CUDA_ARCHS") or ARCHITECTURES).replace(" ", "")
    generate = code_flags(architectures)
    toolkit, compiler = find_toolkit(switch("FUSED_ATTENTION_CUDA") == "pypi"), find_compiler()
    version = f"nvcc {toolkit.version[0]}.{toolkit.version[1]}"
    includes = [*include_flags(folder), "-isystem", str(toolkit.include)]
    flags, link_flags = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    link = ["-shared", f"-L{toolkit.libraries}", *LINK_FLAGS, *link_flags]
    host, host_flags = compiler.launched
    nvcc = [
        str(toolkit.nvcc),
        "-ccbin",
        host,
        *NVCC_FLAGS,
        *smallest(toolkit.version),
        *through_nvcc([*host_flags, *flags]),
        *generate,
        *includes,
    ]
    binding = [*compiler.command, *FLAGS, *flags, f'-DFUSED_ATTENTION_ARCHITECTURES="{architectures}"', *includes]
    rules = {
        "kernels": f"{command(*nvcc)} -MMD -MF $out.d -c $in -o $out",
        "binding": f"{command(*binding)} -MMD -MF $out.d -c $in -o $out",
        "link": f"{command(*compiler.command)} $in {command(*link)} -o $out",
    }
    objects = {f"{Path(source).stem}.o": (source, "kernels" if source.endswith(".cu") else "binding") for source in sources}
    # nvcc reads these variables itself; neither they nor another compiler in the same place change a command.
    unseen = (f"{name}={os.environ.get(name, '')}" for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"))
    compilers = "\n".join((toolkit.build, compiler.version, *unseen))
    library = make(folder, rules, objects, "_cuda.so", compilers, f"the CUDA sources do not compile with {version} and {compiler.version}")
    place(library, target)
    return {
        "compiler": f"{version}, {compiler.version}",
        "architectures": architectures,
        "flags": shlex.join([*NVCC_FLAGS, *flags]),
        "pybind11": pybind_version(),
    }


def smallest(version: tuple[int, int]) -> list[str]:
    """A third less than nvcc's own choice. Drivers of CUDA 12 that are older than the compiler could not read it."""
    return ["--compress-mode=size"] if version >= (13, 0) else []


def through_nvcc(flags: list[str]) -> list[str]:
    """Flags for the C++ compiler that nvcc calls; at a comma it would see the next one begin."""
    return ["-Xcompiler=" + flag.replace(",", "\\,") for flag in flags]


def code_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list such as 80+PTX,90; an entry that is none ends the build."""
    flags = []
    for entry in architectures.split(","):
        found = re.fullmatch(r"((\d{2,3})[af]?)(\+PTX)?", entry)
        if found is None:
            raise SystemExit(f"FUSED_ATTENTION_CUDA_ARCHS is {architectures!r}: {entry!r} is no architecture, as 90 or 80+PTX are")
        if int(found[2]) < OLDEST:
            raise SystemExit(f"FUSED_ATTENTION_CUDA_ARCHS is {architectures!r}: the kernels need the instructions of {OLDEST} or later")
        number, portable = found[1], found[3]
        front_end = next(first for first in FRONT_ENDS if int(found[2]) >= first) if number == found[2] else number
        flags.append(f"-gencode=arch=compute_{front_end},code=sm_{number}")
        if portable:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
