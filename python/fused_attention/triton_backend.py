"""The Triton kernels as a backend: CUDA and ROCm tensors, every option, forward and backward.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs the same kernels on CPU tensors, for proofs; only where asked by name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import AttentionOutput, Gradients, Problem, empty_output, empty_results

LARGEST_HEAD_DIM = 512
MOST_PROGRAMS = 2**31 - 1  # of a grid's first dimension
SMALLEST_TILE = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_TRITON = (3, 6)
EXACT = "tf32x3"  # products of fp32 in three of TF32
INTERPRETER = "interpreter"  # stands for an architecture


class TritonBackend:
    name = "triton"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        interpreted = problem.device.type == "cpu" and _interpreting()
        if problem.device.type != "cuda" and not interpreted:
            return f"q is on {problem.device}, and the triton backend computes on CUDA and ROCm tensors"
        if problem.dtype not in DTYPES and not interpreted:
            return f"q is {problem.dtype}, and the triton backend computes torch.float16, torch.bfloat16 and torch.float32 on a GPU"
        if _widest(problem) > LARGEST_HEAD_DIM:
            dims = f"head_dim is {problem.head_dim}, head_dim_v {problem.head_dim_v}"
            return f"{dims}, and the triton backend computes up to {LARGEST_HEAD_DIM}"
        if _programs(problem) > MOST_PROGRAMS:
            shape = f"{problem.batch} x {problem.heads} heads of {problem.seqlen_q} queries and {problem.seqlen_k} keys"
            return f"q and k have {shape}: more tiles of {SMALLEST_TILE} than the {MOST_PROGRAMS} programs of a GPU's grid"
        return None if interpreted else _too_old(problem)

    def slower(self, problem: Problem) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        kernels = _kernels()
        out, lse = empty_results(q, problem)
        tile = _tile("decode", problem)
        if kernels.decode.suits(problem.seqlen_q, problem.group, problem.packed, tile):
            kernels.decode.decode(q, k, v, out, lse, problem, tile)
        else:
            kernels.forward.forward(q, k, v, out, lse, problem, _tile("forward", problem))
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        kernels, tile = _kernels(), functools.partial(_tile, problem=problem)
        split = kernels.tiles.splits_key_value(architecture(problem.device), _widest(problem), problem.dtype.itemsize)
        return Gradients(*kernels.backward.backward(dout, dlse, q, k, v, out, lse, problem, problem.gradients, tile, split))


def attend_pages(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, problem: Problem) -> Tensor | None:
    """The output of a problem of this backend that needs no gradient, or None where the kernel that reads pages does not take it.

    k, v: (pages, kv_heads, page_size, head_dim or head_dim_v), any strides. page_table: (batch, pages of a member), int32, any strides:
    its values are cut to the pages there are. problem: with page_size keys for each of a member's pages.
    """
    decode, tile = _kernels().decode, _tile("decode", problem)
    if not decode.suits(problem.seqlen_q, problem.group, problem.packed, tile):
        return None
    out = empty_output(q, problem.head_dim_v)
    lse = torch.empty(q.shape[:3], dtype=problem.accumulate_dtype, device=q.device)
    decode.decode(q, k, v, out, lse, problem, tile, page_table)
    return out


class Kernels(NamedTuple):
    """The modules that need triton to be imported."""

    forward: ModuleType
    decode: ModuleType
    backward: ModuleType
    tiles: ModuleType


@functools.cache
def _kernels() -> Kernels:
    from .triton_kernels import backward, decode, forward, tiles

    return Kernels(forward, decode, backward, tiles)


def _tile(name: str, problem: Problem) -> Any:
    precision = _precision() if problem.dtype is torch.float32 else EXACT
    by_pair = problem.mask is not None or problem.bias is not None or problem.dropout_seed is not None
    return _kernels().tiles.choose(architecture(problem.device), name, _widest(problem), problem.dtype.itemsize, precision, by_pair)


def _widest(problem: Problem) -> int:
    return max(problem.head_dim, problem.head_dim_v)


def _precision() -> str:
    """What fp32 products may lose: nothing, unless the user lets PyTorch's own matrix products use TF32."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else EXACT


def _programs(problem: Problem) -> int:
    """An upper bound, whatever the tiles."""
    longest = max(problem.seqlen_q, problem.seqlen_k)
    tiles = longest // SMALLEST_TILE + problem.batch if problem.packed else (longest // SMALLEST_TILE + 1) * problem.batch
    return tiles * problem.heads


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ...: what the tiles are chosen by."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName.partition(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def _too_old(problem: Problem) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = problem.architecture or torch.cuda.get_device_capability(problem.device)
    if capability >= (8, 0):
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the triton backend needs 8.0 (Ampere) or later"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'fused-attention[triton]'"
    if _interpreting():
        return None
    if torch.cuda.is_available():
        return _outdated()
    return "no GPU is visible on this machine, and the Triton kernels run on one"


def _outdated() -> str | None:
    installed = importlib.metadata.version("triton")
    if tuple(int(part) for part in installed.split(".")[:2]) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"triton {installed} is installed, and the kernels need {oldest} or later: upgrade PyTorch, which brings its own"
