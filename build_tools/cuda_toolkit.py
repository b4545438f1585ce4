"""Finds nvcc, and what belongs to it: from CUDA_HOME, CUDA_PATH or PATH, or from the packages that PyPI has.

On PATH nvcc may be a script that calls another, so it is asked where it is, not the file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools.errors import CompileError

# All of one release: nvcc alone would bring a newer nvvm, whose output its ptxas does not read.
PACKAGES = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime"))
OLDEST = (12, 8)  # that knows sm_100 and sm_120


class Toolkit(NamedTuple):
    """How to call nvcc, where its headers and the static runtime are, its version, and all that it says of itself."""

    nvcc: Path
    include: Path
    libraries: Path
    version: tuple[int, int]
    build: str


def find_toolkit(from_packages: bool = False) -> Toolkit:
    """Raises CompileError with a sentence where there is none, or one that won't do."""
    if sys.platform != "linux":
        raise CompileError(f"the CUDA kernels are built on Linux alone, and this is {sys.platform}")
    nvcc = _packaged_nvcc() if from_packages else _installed_nvcc()
    home, version, build = _describe(nvcc)
    if version < OLDEST:
        raise CompileError(f"{nvcc} is of CUDA {version[0]}.{version[1]}: install CUDA {OLDEST[0]}.{OLDEST[1]} or later")
    # The packages have lib and no lib64, which nvcc itself would look into.
    places = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    libraries = next((place for place in places if (place / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise CompileError(f"{home} has no libcudart_static.a: install the development files of the CUDA runtime beside {nvcc}")
    headers = [home / "include", *sorted(home.glob("targets/*/include"))]
    include = next((place for place in headers if (place / "cuda_runtime.h").exists()), None)
    if include is None:
        raise CompileError(f"{home} has no cuda_runtime.h: install the development files of the CUDA runtime beside {nvcc}")
    return Toolkit(nvcc, include, libraries, version, build)


def _installed_nvcc() -> Path:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        given = os.environ.get(name)
        if given:
            nvcc = Path(given, "bin", "nvcc")
            if not nvcc.exists():
                raise CompileError(f"{name} is {given}, where there is no bin/nvcc: correct it, or unset it to search PATH")
            return nvcc
    found = shutil.which("nvcc")
    if found is None:
        raise CompileError("nvcc was not found: put it on PATH, set CUDA_HOME, or set FUSED_ATTENTION_CUDA=pypi to fetch it from PyPI")
    return Path(found)


def _packaged_nvcc() -> Path:
    for path in sys.path:
        for nvcc in sorted(Path(path or ".").glob("nvidia/cu*/bin/nvcc")):
            return nvcc
    raise CompileError(f"nvcc is not among the installed packages: pip install {' '.join(map(repr, PACKAGES))}")


def _describe(nvcc: Path) -> tuple[Path, tuple[int, int], str]:
    """The folder of the toolkit, its version, and what nvcc says of itself."""
    plan, release = _ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull), _ask(nvcc, "--version")
    home, version = re.search(r"_HERE_=(.+)", plan), re.search(r"release (\d+)\.(\d+)", release)
    if home is None or version is None:
        raise CompileError(f"{nvcc} does not say where it is and of which release: name another one in CUDA_HOME")
    return Path(home[1].strip()).parent, (int(version[1]), int(version[2])), release


def _ask(nvcc: Path, *arguments: str) -> str:
    try:
        return subprocess.run([str(nvcc), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{nvcc} does not run ({error}): correct CUDA_HOME or PATH") from error
