"""The CUDA kernels for this machine's GPU, compiled here by whichever process comes first, and put where the package looks for them."""

from __future__ import annotations

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


def provide(device: torch.device) -> str | None:
    """Why there are no CUDA kernels; None: `backend="cuda"` computes on this device, with those of the installation if it has them."""
    if KERNELS["cuda"].unavailable() is not None:
        reason = build("{}{}".format(*torch.cuda.get_device_capability(device)))
        if reason is not None:
            return reason
        load()
    return KERNELS["cuda"].unavailable()


def build(architecture: str) -> str | None:
    """Makes the library, or says why it can't be made."""
    import fcntl  # not on every system, and every test run imports this file

    sys.path.insert(0, str(ROOT))
    try:
        from setuptools.errors import CompileError

        from build_tools.cuda_extension import compile_cuda
    except ImportError as error:
        return f"the CUDA kernels can't be compiled here: {error}"
    finally:
        sys.path.remove(str(ROOT))
    FOLDER.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ["FUSED_ATTENTION_CUDA_ARCHS"] = architecture
        os.chdir(ROOT)  # whose sources the build names
        try:
            sources = sorted(str(path.relative_to(ROOT)) for kind in ("cu", "cpp") for path in (ROOT / "csrc" / "cuda").glob(f"*.{kind}"))
            compile_cuda(sources, LIBRARY, FOLDER / f"objects-{architecture}")
        except (CompileError, ImportError) as error:
            return f"the CUDA kernels can't be compiled here: {error}"
        finally:
            os.chdir(before)
            del os.environ["FUSED_ATTENTION_CUDA_ARCHS"]
    return None


def load() -> None:
    spec = importlib.util.spec_from_file_location("fused_attention._cuda", LIBRARY)
    if spec is None or spec.loader is None:
        raise ImportError(f"{LIBRARY} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fused_attention._cuda"] = fused_attention._cuda = module
    for answer in (cuda_backend._module, cuda_backend._unavailable, cuda_backend._built_for):
        answer.cache_clear()
