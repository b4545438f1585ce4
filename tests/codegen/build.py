"""Compiling a recorded launch for a GPU that is not there, and reading what the machine code costs.

Triton's own front door is used, arguments specialised as in a launch; only the driver, which would ask the GPU what it is, stands in.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from .record import Launch

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory a block may use; the compiler does not refuse more, the launch does.
KILOBYTES = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SHARED_LIMITS = {architecture: size * 1024 for architecture, size in KILOBYTES.items()}
TENSOR_MEMORY = 512  # columns, on Blackwell
SPILL = r"\b(LDL|STL)\b"


class Cost(NamedTuple):
    """What one kernel takes of the machine."""

    registers: int
    spills: int  # local loads and stores in the machine code; on AMD spilled registers
    loop_spills: int  # those repeated with every tile (not known on AMD)
    shared: int  # bytes
    tensor_memory: int = 0  # columns
    products: int = 0  # instructions of the tensor cores
    waits: int = 0  # for them
    serialized: int = 0  # 1: ptxas says that no wgmma runs beside another
    exponentials: int = 0
    copies: int = 0  # asynchronous, from global to shared memory
    atomics: int = 0


class StandInDriver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def build(launch: Launch, architecture: str) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of it."""
    said = io.StringIO()
    driver.set_active(StandInDriver(target(architecture)))
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = True  # a cached kernel brings no words of ptxas
        knobs.nvidia.dump_ptxas_log = True
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    return compiled, said.getvalue()


def cost(launch: Launch, architecture: str) -> Cost:
    compiled, said = build(launch, architecture)
    if architecture.startswith("gfx"):
        return amd_cost(compiled.asm["amdgcn"], compiled.metadata.shared)
    return nvidia_cost(compiled, said)


def memory(launch: Launch, architecture: str) -> Cost:
    """What a launch needs that a block may not have, found without the assembler, whose work is most of a compilation."""

    def nothing(self: object, source: object, metadata: dict[str, Any], *others: object) -> str:
        metadata.setdefault("name", launch.name)
        return "nothing"

    stages = [(CUDABackend, "make_ptx"), (CUDABackend, "make_cubin"), (HIPBackend, "make_amdgcn"), (HIPBackend, "make_hsaco")]
    with contextlib.ExitStack() as patches:
        for backend, stage in stages:
            patches.enter_context(mock.patch.object(backend, stage, nothing))
        compiled, _ = build(launch, architecture)
    return Cost(0, 0, 0, compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0)


def nvidia_code(compiled: Any) -> str:
    """The machine code, disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([NVIDIA_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def nvidia_cost(compiled: Any, said: str) -> Cost:
    code = nvidia_code(compiled)
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise RuntimeError(f"ptxas named no number of registers: {said!r}")
    return Cost(
        registers=int(registers[1]),
        spills=count(SPILL, code),
        loop_spills=sum(count(SPILL, loop) for loop in innermost_loops(code)),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        products=count(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", code),
        waits=count(r"\bWARPGROUP\.DEPBAR\b", code),
        serialized=int("serialized" in said),
        exponentials=count(r"\bMUFU\.EX2\b", code),
        copies=count(r"\bLDGSTS\b", code),
        atomics=count(r"^\s*(@%?\w+ )?(atom|red)\.", compiled.asm["ptx"]),
    )


def innermost_loops(code: str) -> list[str]:
    """The instructions from each label to the last jump back to it, where no other such loop lies between."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\.L_x_\d+):", code, re.MULTILINE)}
    ends: dict[int, int] = {}
    for jump in re.finditer(r"\bBRA(?:\.\w+)*\s[^\n]*`\((\.L_x_\d+)\)", code):
        start = labels[jump[1]]
        if start < jump.start():
            ends[start] = max(ends.get(start, 0), jump.end())
    return [
        code[start:end] for start, end in ends.items() if not any(start < other and ends[other] < end for other in ends if other != start)
    ]


def amd_cost(code: str, shared: int) -> Cost:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the compiled code names no .{name}")
        return int(found[1])

    return Cost(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        loop_spills=0,
        shared=shared,
        products=count(r"\bv_s?mfmac?_", code),
        exponentials=count(r"\bv_exp_f32", code),
        atomics=count(r"\b(global|flat|buffer|ds)_atomic", code),
    )


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))
