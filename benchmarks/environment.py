"""Where and how numbers were made: the stamp in every JSON file, and whether two stamps may be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fused_attention

from .timing import Protocol

# Two files whose stamps differ in one of these were not measured alike; versions of ours are what a comparison is about.
COMPARED = ("cpu", "cores", "instruction_sets", "system", "python", "torch", "threads", "clock", "malloc")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "bf16", "sve")


def stamp(protocol: Protocol, malloc: str, seed: int) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat the numbers."""
    info = _processor()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": "/".join(info.get(key, "?") for key in ("cpu family", "model")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in info.get("flags", info.get("Features", "")).split()],
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": protocol.threads,
        "clock": protocol.clock_name,
        "malloc": malloc,
        "package": getattr(fused_attention, "__version__", "unknown"),
        "revision": _revision(),
        "backends": dict(fused_attention.backends()),
        "seed": seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "least_rounds": protocol.least_rounds,
        "most_rounds": protocol.most_rounds,
        "budget_seconds": protocol.budget,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A sentence for every fact that keeps two stamps from being compared."""
    return [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in COMPARED if before.get(key) != after.get(key)]


def one_line(environment: dict[str, Any]) -> str:
    threads = "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    widest = "AVX-512" if "avx512f" in environment["instruction_sets"] else "AVX2" if "avx2" in environment["instruction_sets"] else None
    chip = f"{environment['cpu']} ({environment['cores']} cores{f', {widest}' if widest else ''})"
    return f"{chip}, {threads}, {environment['clock']}, torch {environment['torch']}, fused-attention {environment['package']}"


def _processor() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return {}
    first = source.read_text(errors="replace").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _revision() -> str | None:
    """The git revision of the sources this file belongs to, `-dirty` if they were changed; None for an installed package."""
    source = Path(__file__).resolve()  # the folder may be a link to the checkout's
    here = source.parent
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", str(source)], cwd=here, capture_output=True, timeout=10)
        if tracked.returncode:
            return None
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
