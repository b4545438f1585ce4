"""Compiling csrc/cuda for a GPU that is not there, as the build does, and reading what the machine code of each kernel costs.

The library itself says how much shared memory a launch gives a kernel; the rest stands in the machine code.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "codegen" / "cuda"
TYPES = tuple(path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))  # a source each
SPILL = r"\b(LDL|STL)\b"
# Of a multiprocessor: bytes of shared memory, of which each block takes a kilobyte more than it asks for; and registers.
KILOBYTES = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}
REGISTERS, MOST_THREADS = 65536, {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}


class Cost(NamedTuple):
    """What one kernel takes of the machine."""

    threads: int
    shared: int  # bytes
    registers: int
    blocks: int  # that a multiprocessor runs at once
    stack: int  # bytes a thread
    spills: int  # loads and stores of a thread's own memory
    loop_spills: int  # those inside a loop
    products: int  # HMMA
    loads: int  # LDSM, of four 8x8 matrices
    transposed: int  # those of them that transpose
    copies: int  # LDGSTS, from global to shared memory
    instructions: int


def missing() -> str | None:
    """Why the kernels can't be compiled here."""
    for name in ("nvcc", "g++"):
        if shutil.which(name) is None:
            return f"{name} is not on PATH"
    for name in ("pybind11", "ninja", "setuptools", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None if tool("nvdisasm").exists() else "triton brings no nvdisasm here"


def tool(name: str) -> Path:
    """A disassembler, of those that triton brings."""
    (folder,) = importlib.util.find_spec("triton").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(folder) / "backends" / "nvidia" / "bin" / name


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\d+\.\d+)", said)[0]


def costs(architecture: str, types: tuple[str, ...] = TYPES) -> dict[str, Cost]:
    """By name, as forward_kernel<ForwardConfig<BFloat16, 64, 128, 64, 4, false>>, of every kernel for one architecture such as sm_90."""
    library = build(architecture, types)
    known = launches(library)
    found = {
        name: cost(architecture, *known[name], registers, stack, code)
        for name, registers, stack, code in disassembled(library)
        if name in known
    }
    if len(found) < len(known):
        raise RuntimeError(f"the machine code holds none of {', '.join(known.keys() - found.keys())}, which the library launches")
    return found


def build(architecture: str, types: tuple[str, ...]) -> Path:
    """The library, with objects that stay for the next time."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from build_tools.cuda_extension import compile_cuda

    folder = FOLDER / "-".join((architecture, *types))
    sources = [f"csrc/cuda/{name}.cu" for name in types]
    before = Path.cwd()
    os.chdir(ROOT)  # whose sources the build names
    try:
        with mock.patch.dict(os.environ, {"FUSED_ATTENTION_CUDA_ARCHS": architecture.removeprefix("sm_")}):
            compile_cuda([*sources, "csrc/cuda/device.cpp", "tests/codegen/kernel_list.cpp"], folder / "kernels.so", folder)
    finally:
        os.chdir(before)
    return folder / "kernels.so"


def launches(library: Path) -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of each kernel."""
    kernel_list = ctypes.CDLL(str(library)).kernel_list
    kernel_list.restype = ctypes.c_char_p
    lines = (line.split("\t") for line in kernel_list().decode().splitlines())
    return {plain(name): (int(threads), int(shared)) for name, threads, shared in lines}


def disassembled(library: Path) -> list[tuple[str, int, int, str]]:
    """Name, registers, bytes of stack and machine code of each kernel."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        said(tool("cuobjdump"), "-xelf", "all", library, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            usage = said(tool("cuobjdump"), "--dump-resource-usage", cubin)
            numbers = {
                name: (int(registers), int(stack))
                for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
            }
            _, *parts = re.split(r"^//-+ \.text\.(\S+) -+$", said(tool("nvdisasm"), "-c", cubin), flags=re.MULTILINE)
            names = said("c++filt", *parts[::2]).splitlines()
            found += [
                (plain(name), *numbers[mangled], code.split("\n//---")[0])
                for name, mangled, code in zip(names, parts[::2], parts[1::2], strict=True)
            ]
    return found


def said(*command: object, cwd: str | None = None) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True, cwd=cwd).stdout


def plain(name: str) -> str:
    """The name of a kernel without return type, arguments and unnamed namespaces, which each compiler writes differently."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void |\(AttentionParams\)$|^&", "", name.strip())
    return name.replace("> >", ">>")


def cost(architecture: str, threads: int, shared: int, registers: int, stack: int, code: str) -> Cost:
    return Cost(
        threads,
        shared,
        registers,
        blocks(architecture, threads, shared, registers),
        stack,
        spills=count(SPILL, code),
        loop_spills=count(SPILL, looped(code)),
        products=count(r"\bHMMA\b", code),
        loads=count(r"\bLDSM\b", code),
        transposed=count(r"\bLDSM\.16\.MT88", code),
        copies=count(r"\bLDGSTS\b", code),
        instructions=count(r"^\s+/\*[0-9a-f]{4,}\*/", code),
    )


def blocks(architecture: str, threads: int, shared: int, registers: int) -> int:
    """How many a multiprocessor has room for; a warp takes registers by the 256."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * threads // 32)
    by_memory = KILOBYTES[architecture] * 1024 // (shared + 1024)
    return min(by_registers, by_memory, MOST_THREADS[architecture] // threads)


def looped(code: str) -> str:
    """The lines between a label and a jump back to it."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\.L_x_\d+):", code, re.MULTILINE)}
    jumps = [(labels[jump[1]], jump.start()) for jump in re.finditer(r"\bBRA(?:\.\w+)*\s[^\n]*`\((\.L_x_\d+)\)", code)]
    starts = 0
    kept = []
    for start, end in sorted(jump for jump in jumps if jump[0] < jump[1]):
        kept.append(code[max(start, starts) : end])
        starts = max(starts, end)
    return "\n".join(kept)


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))
