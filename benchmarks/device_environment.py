"""Where and how numbers of a GPU were made: the stamp of a run, as JSON on standard output.

python -m fused_attention.benchmarks.device_environment
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from typing import Any

import torch

from .device_timing import DeviceProtocol, best_gemm, copy_bandwidth
from .environment import stamp
from .timing import Protocol

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "ecc.mode.current")
PACKAGES = ("torch", "triton", "numpy", "pytest")


def device_stamp() -> dict[str, Any]:
    """The facts of `environment.stamp`, and of the GPU, its driver and the libraries that compute on it; the device's peaks as measured."""
    protocol = DeviceProtocol() if torch.cuda.is_available() else Protocol()
    return stamp(protocol, "the system's default", 0) | {
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": _gpu(protocol) if isinstance(protocol, DeviceProtocol) else None,
    }


def _gpu(protocol: DeviceProtocol) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": [facts.major, facts.minor],
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": getattr(facts, "L2_cache_size", None),
        "best_gemm": {"bf16": best_gemm(torch.bfloat16, protocol), "fp16": best_gemm(torch.float16, protocol)},
        "copy_bandwidth": copy_bandwidth(protocol),
        "nvidia_smi": _nvidia_smi(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str] | str:
    """What the driver says of the first GPU, right after it has worked; only read, never set."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return dict(zip(QUERY, (value.strip() for value in found.stdout.strip().split(",")), strict=False))


if __name__ == "__main__":
    print(json.dumps(device_stamp()))
