"""Compiles csrc/cuda into fused_attention._cuda: the kernels by nvcc, the binding by the C++ compiler, under ninja; no torch.

    nvcc FLAGS -gencode ... -c x.cu -o x.o        c++ FLAGS -c y.cpp -o y.o        c++ -shared *.o -lcudart_static -o _cuda.so

FUSED_ATTENTION_CUDA_ARCHS names the architectures to compile for, as 80+PTX,90; +PTX: for later ones too, by the driver.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

from setuptools import Extension

from build_tools.cpu_extension import find_compiler
from build_tools.cuda_toolkit import find_toolkit
from build_tools.ninja import command, include_flags, make, pybind_version
from build_tools.switches import switch

# What is compiled for sm_80 also runs on 86, 87 and 89, and its PTX on whatever comes later.
ARCHITECTURES = "80+PTX,90,100,120"
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-g0")
# Static and hidden: beside torch's own runtime there is a second one, and neither may see the other's symbols.
LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-s", "-Wl,--exclude-libs,ALL")


def cuda_extension() -> Extension:
    """The extension with paths relative to the project; the headers are named so that a source distribution carries them."""
    headers = [path for kind in ("h", "inl", "cuh") for path in glob(f"csrc/**/*.{kind}", recursive=True)]
    return Extension("fused_attention._cuda", sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")), depends=sorted(headers))


def compile_cuda(sources: list[str], target: Path, folder: Path) -> dict[str, str]:
    """Makes `target` from `sources` with objects under `folder`; returns what was used, raises CompileError with the compiler's message."""
    architectures = os.environ.get("FUSED_ATTENTION_CUDA_ARCHS") or ARCHITECTURES
    generate = code_flags(architectures)
    toolkit, compiler = find_toolkit(switch("FUSED_ATTENTION_CUDA") == "pypi"), find_compiler()
    version = f"nvcc {toolkit.version[0]}.{toolkit.version[1]}"
    includes = [*include_flags(folder), "-isystem", str(toolkit.include)]
    link = ["-shared", f"-L{toolkit.libraries}", *LINK_FLAGS]
    nvcc = [str(toolkit.nvcc), "-ccbin", compiler.command[0], *NVCC_FLAGS, *generate, *includes]
    rules = {
        "kernels": f"{command(*nvcc)} -MMD -MF $out.d -c $in -o $out",
        "binding": f"{command(*compiler.command, *FLAGS, *includes)} -MMD -MF $out.d -c $in -o $out",
        "link": f"{command(*compiler.command)} $in {command(*link)} -o $out",
    }
    objects = {f"{Path(source).stem}.o": (source, "kernels" if source.endswith(".cu") else "binding") for source in sources}
    library = make(folder, rules, objects, "_cuda.so", f"the CUDA sources do not compile with {version} and {compiler.version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(library, target)
    flags = shlex.join(NVCC_FLAGS)
    return {
        "compiler": f"{version}, {compiler.version}",
        "architectures": architectures,
        "flags": flags,
        "pybind11": pybind_version(),
    }


def code_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list such as 80+PTX,90; an entry that is none ends the build."""
    flags = []
    for entry in architectures.split(","):
        found = re.fullmatch(r"(\d{2,3}[af]?)(\+PTX)?", entry.strip())
        if found is None:
            raise SystemExit(f"FUSED_ATTENTION_CUDA_ARCHS is {architectures!r}: {entry!r} is no architecture, as 90 or 80+PTX are")
        number, portable = found.groups()
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if portable:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
