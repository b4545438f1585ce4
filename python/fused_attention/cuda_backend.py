"""The CUDA C++ kernels as a backend: NVIDIA GPUs from compute capability 8.0 on, where Triton can't serve.

The compiled module takes addresses, strides and a stream, so that it needs no torch to build; it copies no tensor, allocates nothing
and waits for nothing. The kernels are proved on the CPU and have not yet run on a GPU.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .built import build_reason
from .cpu_arguments import Arguments, view
from .problem import AttentionOutput, Gradients, Problem, empty_results

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256
MOST_ROWS = 2**30  # of a head: kernels count them in 32 bits
MOST_BLOCKS = 2**31 - 1  # of a grid
SMALLEST_TILE = 64
OLDEST = (8, 0)


class CudaBackend:
    name = "cuda"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"q is on {problem.device}, and the cuda backend computes on CUDA tensors"
        return _unsupported(problem) or _too_old(problem)

    def slower(self, problem: Problem) -> str | None:
        return "the CUDA kernels have not yet run on a GPU: only backend='cuda' takes them"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        out, lse = empty_results(q, problem)
        call = Arguments(q, k, v, out, lse, problem)
        _module().forward(call.tensors, call.sizes, call.visible, call.options, *_queue(q.device))
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        lse, dlse, wanted = lse.contiguous(), None if dlse is None else dlse.contiguous(), problem.gradients
        # Rows of no member and keys that no head reads have a gradient of 0, and nobody would write it.
        new = torch.empty_like if problem.heads and not problem.packed else torch.zeros_like
        dq = new(q) if "q" in wanted else None
        dk, dv = (new(k), new(v)) if wanted & {"k", "v"} else (None, None)
        delta = torch.empty_like(lse)
        call = Arguments(q, k, v, out, lse, problem)
        gradients = (view(dout), 0 if dlse is None else dlse.data_ptr(), view(dq), view(dk), view(dv), delta.data_ptr())
        _module().backward(call.tensors, call.sizes, call.visible, call.options, gradients, *_queue(q.device))
        return Gradients(dq, dk, dv)


def _unsupported(problem: Problem) -> str | None:
    """Why the kernels can't compute it, on whatever device."""
    if problem.dtype not in DTYPES:
        return f"q is {problem.dtype}, and the cuda backend computes torch.float16 and torch.bfloat16"
    if max(problem.head_dim, problem.head_dim_v) > LARGEST_HEAD_DIM:
        dims = f"head_dim is {problem.head_dim}, head_dim_v {problem.head_dim_v}"
        return f"{dims}, and the cuda backend computes up to {LARGEST_HEAD_DIM}"
    if problem.gradients - {"q", "k", "v"}:
        names = ", ".join(sorted(problem.gradients - {"q", "k", "v"}))
        return f"gradients of {names} are needed, and the cuda backend computes those of q, k and v alone so far"
    tiles = problem.seqlen_q // SMALLEST_TILE + 1
    blocks = (tiles + problem.batch if problem.packed else tiles * problem.batch) * problem.heads
    if max(problem.seqlen_q, problem.seqlen_k) > MOST_ROWS or blocks > MOST_BLOCKS:
        shape = f"{problem.batch} x {problem.heads} heads of {problem.seqlen_q} queries and {problem.seqlen_k} keys"
        limits = f"{MOST_ROWS} rows a head, or more tiles of {SMALLEST_TILE} than the {MOST_BLOCKS} blocks of a grid"
        return f"q and k have {shape}: more than {limits}"
    return None


def _too_old(problem: Problem) -> str | None:
    capability = problem.architecture or torch.cuda.get_device_capability(problem.device)
    if capability >= OLDEST:
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the cuda backend needs 8.0 (Ampere) or later"


def _queue(device: torch.device) -> tuple[int, int]:
    """The number of a device and the address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


@functools.cache
def _module() -> ModuleType:
    from . import _cuda

    return _cuda


@functools.cache
def _unavailable() -> str | None:
    try:
        module = _module()
    except ImportError as error:
        reason = build_reason("cuda") or str(error)
        return f"the compiled module fused_attention._cuda is missing: {reason}"
    if torch.version.hip is not None:
        return "this PyTorch computes on AMD GPUs, and the CUDA kernels need an NVIDIA GPU"
    count, why, driver, runtime = module.available()
    if count:
        return None
    if not driver:
        return "this machine has no NVIDIA driver"
    if driver // 1000 < runtime // 1000:
        versions = f"the NVIDIA driver serves CUDA {_version(driver)}, and fused_attention._cuda was built with CUDA {_version(runtime)}"
        return f"{versions}: update the driver, or install fused-attention again with an nvcc of CUDA {driver // 1000}"
    return f"the NVIDIA driver finds no GPU ({why or 'it counts 0'})"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
