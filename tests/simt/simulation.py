"""The CUDA kernels on the CPU: compiled by g++ against a machine that checks every access, and called as the backend calls them.

    with Simulation(compile_simulation(folder)).installed(): CudaBackend().forward(q, k, v, problem)

What it shows is the arithmetic, the layouts, the barriers, the bounds. It can't show the text of the PTX, weak memory order, registers
or speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fused_attention import cuda_backend

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DSIMT_SHIM")
WRONG = ("races", "outside", "written twice", "unawaited", "divergent", "misaligned", "bank conflicts")
WORK = ("products", "loads")
BYTES = (4, 8, 2, 2, 1)  # of an Element of csrc/attention.h

View = tuple[int, ...]
Range = tuple[int, int]  # the first byte, and how many


class Simulation:
    """The compiled library; a warning that the machine gives about a call is an AssertionError."""

    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", library)
        if spec is None or spec.loader is None:
            raise ImportError(f"{library} is no module")
        self.library = library
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.machine = ctypes.CDLL(str(library))
        self.seed = 1
        self.work: dict[str, int] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[Simulation]:
        """In place of the GPU's module: the cuda backend computes on CPU tensors, and finds what it finds unsupported there too."""
        with (
            mock.patch.object(cuda_backend, "_module", return_value=self),
            mock.patch.object(cuda_backend, "_queue", return_value=(0, 0)),
            mock.patch.object(cuda_backend, "_unavailable", return_value=None),
            mock.patch.object(cuda_backend.CudaBackend, "unsupported", lambda _, problem: cuda_backend._unsupported(problem)),
        ):
            yield self

    def forward(self, tensors: tuple[Any, ...], sizes: tuple[Any, ...], visible: Any, options: Any, device: int, stream: int) -> None:
        reads, writes = ranges(tensors, sizes, visible, options)
        self._watch(reads, writes, poison=not packed(sizes))
        self.module.forward(tensors, sizes, visible, options, device, stream)
        self._judge()

    def forward_split(self, tensors: Any, sizes: Any, visible: Any, options: Any, split: Any, pages: Any, device: int, stream: int) -> None:
        reads, writes = ranges(tensors, sizes, visible, options)
        batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, *_ = sizes
        keys, out, lse = split
        numbers = 4 * -(-seqlen_k // keys) * batch * heads * seqlen_q
        writes += [(out, numbers * head_dim_v), (lse, numbers)]
        table, stride, count, page_size = pages
        if table:
            reads[1:3] = (extent(x, (count, kv_heads, page_size, dim)) for x, dim in zip(tensors[1:3], (head_dim, head_dim_v), strict=True))
            reads.append((table, 4 * ((batch - 1) * stride + seqlen_k // page_size)))
        self._watch(reads, writes, poison=True)
        self.module.forward_split(tensors, sizes, visible, options, split, pages, device, stream)
        self._judge()

    def backward(self, tensors: Any, sizes: Any, visible: Any, options: Any, gradients: tuple[Any, ...], device: int, stream: int) -> None:
        reads, writes = ranges(tensors, sizes, visible, options)
        dout, dlse, dq, dk, dv, delta, dbias, dslopes, by_row = gradients
        out, lse = writes
        numbers, laid_out = lse[1], shapes(sizes)
        reads += [out, lse, extent(dout, laid_out[3]), (dlse, numbers)]
        writes = [(delta, numbers), (by_row, numbers), extent(dbias, pairs(sizes)), (dslopes, 4 * sizes[0] * sizes[1])]
        writes += [*(extent(x, shape) for x, shape in zip((dq, dk, dv), laid_out[:3], strict=True))]
        self._watch(reads, writes, poison=not packed(sizes))
        self.module.backward(tensors, sizes, visible, options, gradients, device, stream)
        self._judge()

    def _watch(self, reads: list[Range], writes: list[Range], poison: bool) -> None:
        self.machine.simt_reset(self.seed)
        for ranges, writable in ((reads, False), (writes, True)):
            for address, size in ranges:
                if address and size > 0:
                    if writable and poison:
                        ctypes.memset(address, 0xFF, size)  # nan, or a result of the last call would pass for one of this
                    self.machine.simt_watch(ctypes.c_void_p(address), ctypes.c_size_t(size), writable)

    def _judge(self) -> None:
        counts, told = (ctypes.c_long * (len(WRONG) + len(WORK)))(), ctypes.create_string_buffer(1000)
        self.machine.simt_report(counts, told, ctypes.c_size_t(len(told)))
        found = dict(zip((*WRONG, *WORK), counts, strict=True))
        self.work = {name: found[name] for name in WORK}
        wrong = {name: found[name] for name in WRONG if found[name]}
        if wrong:
            raise AssertionError(f"the machine found {wrong}: {told.value.decode()}")


def compile_simulation(folder: Path, sources: Path = ROOT / "csrc", bindings: Path | None = None) -> Path:
    """The library, in `folder`, from `sources`, and from the bindings unless an object of them is given."""
    library, kernels = folder / "_cuda.so", folder / "simulated.o"
    objects = [str(bindings or compile_bindings(folder, sources)), str(kernels)]
    compile_one(ROOT / "tests" / "simt" / "simulated.cpp", kernels, sources, "-O1", "-Wno-unknown-pragmas")
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(library)], check=True, capture_output=True)
    return library


def compile_bindings(folder: Path, sources: Path = ROOT / "csrc") -> Path:
    import pybind11

    target = folder / "bindings.o"
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    compile_one(sources / "cuda" / "bindings.cpp", target, sources, "-O0", *includes)
    return target


def compile_one(source: Path, target: Path, sources: Path, *flags: str) -> None:
    command = [str(COMPILER), *FLAGS, *flags, f"-I{sources}", f"-I{ROOT / 'tests' / 'simt'}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for the CPU: {done.stderr}")


def extent(view: View, shape: tuple[int, ...]) -> tuple[int, int]:
    """The first byte of a tensor that a kernel may read or write, and how many there are."""
    address, element, *strides = view
    if not address or 0 in shape:
        return 0, 0
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    first, last = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    return address + first * BYTES[element], (last - first + 1) * BYTES[element]


def packed(sizes: tuple[Any, ...]) -> bool:
    """Rows of no member then hold what nobody writes."""
    return bool(sizes[7])


def shapes(sizes: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Of q, k, v and out; packed rows all lie in one member."""
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, cu_q, _, _ = sizes
    members = 1 if cu_q else batch
    queries, keys = (members, heads, seqlen_q), (members, kv_heads, seqlen_k)
    return [(*queries, head_dim), (*keys, head_dim), (*keys, head_dim_v), (*queries, head_dim_v)]


def pairs(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Of a mask or a bias, which have a stride of 0 where they have one place for all."""
    batch, heads, _, seqlen_q, seqlen_k, *_ = sizes
    return batch, heads, seqlen_q, seqlen_k


def ranges(
    tensors: tuple[Any, ...], sizes: tuple[Any, ...], visible: tuple[Any, ...], options: tuple[Any, ...] | None
) -> tuple[list[Range], list[Range]]:
    """What the forward reads, q, k and v first, and what it writes: out and lse."""
    batch, heads, _, seqlen_q, _, _, _, cu_q, cu_k, _ = sizes
    q, k, v, out, lse, _, _ = tensors
    laid_out = shapes(sizes)
    reads = [extent(x, shape) for x, shape in zip((q, k, v), laid_out, strict=False)]
    reads += [(address, 8 * (batch + 1)) for address in (cu_q, cu_k)]
    _, _, starts, ends, kv_stride, offsets, _, _ = visible
    reads += [(address, 8 * ((batch - 1) * kv_stride + 1)) for address in (starts, ends)] + [(offsets, 8 * batch)]
    if options is not None:
        mask, bias, slopes, slopes_batch, sinks, _, seed, _, _ = options
        reads += [extent(mask, pairs(sizes)), extent(bias, pairs(sizes)), (seed, 16), (sinks, 4 * heads)]
        reads += [(slopes, 4 * heads * (batch if slopes_batch else 1))]
    members = laid_out[0][0]
    return reads, [extent(out, laid_out[3]), (lse, 4 * members * heads * seqlen_q)]
