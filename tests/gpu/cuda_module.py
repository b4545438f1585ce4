"""The CUDA kernels for this machine's GPU, compiled here by whichever process comes first, and put where the package looks for them.

No compiler is a reason to skip; sources that do not compile, and a library that does not load or find the GPU, are failures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import torch

import fused_attention
from fused_attention import cuda_backend
from fused_attention.backend import KERNELS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu" / "cuda"
LIBRARY = FOLDER / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
MADE_OF = FOLDER / "made-of.txt"


def provide(device: torch.device) -> str | None:
    """Why nothing here compiles CUDA kernels; None: `backend="cuda"` computes on this device, with an installation's own if it has them.

    Raises CompileError where a compiler is there and the sources do not compile, ImportError or RuntimeError where the kernels do not load.
    """
    if KERNELS["cuda"].unavailable() is None:
        return None
    reason = no_compiler()
    if reason is not None:
        return f"the CUDA kernels can't be compiled here: {reason}"
    build("{}{}".format(*torch.cuda.get_device_capability(device)))
    load()
    reason = KERNELS["cuda"].unavailable()
    if reason is not None and too_new():
        return reason
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels were compiled here for a GPU that torch computes on, and the backend is off: {reason}")
    return None


def no_compiler() -> str | None:
    """What a build needs and this machine lacks."""
    sys.path.insert(0, str(ROOT))
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401
        from setuptools.errors import CompileError

        from build_tools.cpu_extension import find_compiler
        from build_tools.cuda_toolkit import find_toolkit
        from build_tools.switches import switch
    except ImportError as error:
        return str(error)
    finally:
        sys.path.remove(str(ROOT))
    try:
        find_toolkit(switch("FUSED_ATTENTION_CUDA") == "pypi")
        find_compiler()
    except CompileError as error:
        return str(error)
    return None


def build(architecture: str) -> None:
    """Makes the library, unless a process has made it of these sources; a CompileError where they do not compile."""
    import fcntl  # not on every system, and every test run imports this file

    sys.path.insert(0, str(ROOT))
    try:
        from build_tools.cuda_extension import compile_cuda
    finally:
        sys.path.remove(str(ROOT))
    FOLDER.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = sources_of(architecture)
        if LIBRARY.exists() and MADE_OF.exists() and MADE_OF.read_text() == wanted:
            return
        os.environ["FUSED_ATTENTION_CUDA_ARCHS"] = architecture
        os.chdir(ROOT)  # whose sources the build names
        try:
            sources = sorted(str(path.relative_to(ROOT)) for kind in ("cu", "cpp") for path in (ROOT / "csrc" / "cuda").glob(f"*.{kind}"))
            compile_cuda(sources, LIBRARY, FOLDER / f"objects-{architecture}")
        finally:
            os.chdir(before)
            del os.environ["FUSED_ATTENTION_CUDA_ARCHS"]
        MADE_OF.write_text(wanted)


def sources_of(architecture: str) -> str:
    """An architecture, and a number that tells the text of the sources and of their build; compilers may change between runs alone."""
    digest = hashlib.sha256()
    for folder in ("csrc", "build_tools"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"{architecture} {digest.hexdigest()}"


def too_new() -> bool:
    """Whether the compiler is of a later release than the driver serves: not what a run of this machine can judge."""
    _, _, driver, runtime = cuda_backend._module().available()
    return bool(driver and driver // 1000 < runtime // 1000)


def load() -> None:
    """Puts the library in the place of the installed module; an ImportError where it does not load."""
    spec = importlib.util.spec_from_file_location("fused_attention._cuda", LIBRARY)
    if spec is None or spec.loader is None:
        raise ImportError(f"{LIBRARY} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fused_attention._cuda"] = fused_attention._cuda = module
    for answer in (cuda_backend._module, cuda_backend._unavailable, cuda_backend._built_for):
        answer.cache_clear()
