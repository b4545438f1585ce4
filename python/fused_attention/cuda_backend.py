"""The CUDA C++ kernels as a backend: NVIDIA GPUs from compute capability 8.0 on, where Triton can't serve.

The compiled module takes addresses, strides and a stream, so that it needs no torch to build; it copies no tensor, allocates nothing
and waits for nothing. The kernels are proved on the CPU and have not yet run on a GPU.

What they do less well than they should:
- A product of float32 is three of TF32 whatever `torch.backends.cuda.matmul.fp32_precision` allows, all added to one running sum that each
  of them rounds. A value beyond 3.4019e38 becomes NaN, for its leading bits round up to infinity.
- Where blocks share the keys of few queries, parts are weighed by exp(lse of a part - lse), of which float32 keeps less the larger they
  are: of scores of 1e4 an output is off by up to 1e-3 of itself, of 1e6 by some percent, and beyond 1e7 it may be several times too large.
- The gradient of a bias has one block for each tile of its own size, which visits all that share it: a bias with one row for all
  queries, heads and members keeps few blocks busy, and one with a single place a single one.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch
from torch import Tensor

from .built import build_reason
from .cpu_arguments import Arguments, pairs_view, view
from .cuda_architectures import missing_code
from .problem import AttentionOutput, Gradients, Problem, empty_results

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
MOST_ROWS = 2**30  # of a head: kernels count them in 32 bits
MOST_BLOCKS = 2**31 - 1  # of a grid
SMALLEST_TILE = 32  # of queries or of keys that a block owns
PARTS = 2  # blocks that share a tile of keys in backward
FEWEST_KEYS = 16  # of a tile of pairs that a block owns
FEW_QUERIES = 16  # whose keys blocks share
FEWEST_SPLIT_KEYS = 256  # of a block
MOST_SPLITS = 128
SPLIT_ROWS = 16  # of a tile
NO_PAGES = (0, 0, 0, 0)
DELTA_ROWS = 4  # that a block of the backward adds up
OLDEST = (8, 0)


class CudaBackend:
    name = "cuda"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cuda":
            return f"q is on {problem.device}, and the cuda backend computes on CUDA tensors"
        return _unsupported(problem) or _unserved(problem)

    def slower(self, problem: Problem) -> str | None:
        return "the CUDA kernels have not yet run on a GPU: only backend='cuda' takes them"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        out, lse = empty_results(q, problem)
        if _is_split(problem):
            run_split(q, k, v, out, lse, problem)
        else:
            call = Arguments(q, k, v, out, lse, problem)
            _module().forward(call.tensors, call.sizes, call.visible, call.options, *_queue(q.device))
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        lse, dlse, wanted = lse.contiguous(), None if dlse is None else dlse.contiguous(), problem.gradients
        # Rows of no member and keys that no head reads have a gradient of 0, and nobody would write it.
        new = torch.empty_like if problem.heads and not problem.packed else torch.zeros_like
        dq = new(q) if wanted & {"q", "alibi_slopes"} else None
        dk, dv = (new(k), new(v)) if wanted & {"k", "v"} else (None, None)
        dbias = _dense(problem.bias) if "bias" in wanted else None
        dslopes, by_row = _slope_places(problem, lse) if "alibi_slopes" in wanted else (None, None)
        delta = torch.empty_like(lse)
        call = Arguments(q, k, v, out, lse, problem)
        gradients = (
            *(view(dout), _address(dlse), view(dq), view(dk), view(dv), _address(delta)),
            *(pairs_view(dbias), _address(dslopes), _address(by_row)),
        )
        _module().backward(call.tensors, call.sizes, call.visible, call.options, gradients, *_queue(q.device))
        return Gradients(
            dq,
            dk,
            dv,
            bias=dbias,
            alibi_slopes=_slope_gradient(problem.alibi_slopes, dslopes),
            sinks=_sink_gradient(problem.sinks, lse, delta) if "sinks" in wanted else None,
        )


def run_split(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem, pages: tuple[int, ...] = NO_PAGES) -> None:
    """Few queries, whose keys blocks share; a part of them is FEWEST_SPLIT_KEYS of the keys that the call is shown, up to 32768 of these.

    Shown are the rows of k: of a cache as many as its longest member holds, rounded up to 256 if the capacity allows, of pages to whole
    ones. Up to 32768 the bits of a member are therefore its own, whoever is beside it. Beyond, a part doubles whenever there would be more
    than MOST_SPLITS, and a member beside a much longer one may differ in bits from itself alone; both are in bounds. Fewer than 256 rows of
    k outside of pages are no call of this kind: one block has all keys of a tile, and sums in another order.

    It allocates 4 (head_dim_v + 1) bytes for each part of each row, of keys shown / 256 parts, or 65 to 128 beyond 32768, however short the
    members are: for batch 256, 32 heads, a query and 32768 keys shown of head_dim 128, half a gigabyte, beside 32 of keys and values of
    8 kv_heads.
    pages: the address of a page table, the stride of its rows, how many pages there are, and the keys of each.
    """
    split_keys, splits = _splits(problem)
    rows = (splits, problem.batch, problem.heads, problem.seqlen_q)
    parts, part_lse = lse.new_empty((*rows, problem.head_dim_v)), lse.new_empty(rows)
    call, split = Arguments(q, k, v, out, lse, problem), (split_keys, parts.data_ptr(), part_lse.data_ptr())
    _module().forward_split(call.tensors, call.sizes, call.visible, call.options, split, pages, *_queue(q.device))


def _is_split(problem: Problem) -> bool:
    """Whether blocks share the keys: also where one has them all, as long as a longer member of a cache would give it a second part."""
    return problem.seqlen_q <= FEW_QUERIES and problem.seqlen_k >= FEWEST_SPLIT_KEYS and not problem.packed and not problem.dropout_p


def _splits(problem: Problem) -> tuple[int, int]:
    """How many keys a block reads, and in how many parts that makes them."""
    keys = max(FEWEST_SPLIT_KEYS, 1 << ((problem.seqlen_k - 1) // MOST_SPLITS).bit_length())
    return keys, -(-problem.seqlen_k // keys)


def _dense(bias: Tensor | None) -> Tensor | None:
    """Where the gradient of a bias goes: no two of its elements in one place."""
    return None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)


def _slope_places(problem: Problem, lse: Tensor) -> tuple[Tensor, Tensor]:
    """For the gradients of the slopes of every member's heads, and for what each row adds."""
    return lse.new_empty((problem.batch, problem.heads)), torch.empty_like(lse)


def _slope_gradient(slopes: Tensor | None, by_member: Tensor | None) -> Tensor | None:
    if slopes is None or by_member is None:
        return None
    return (by_member if slopes.dim() == 2 else by_member.sum(0)).to(slopes.dtype)


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """The sink's probability times (0 - delta), summed over its head: it has no value row."""
    if sinks is None:
        return None
    # No probability is above 1, however lse was rounded.
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp((sinks.to(lse.dtype)[:, None] - lse).clamp(max=0.0)))
    return -(weights * delta).movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unsupported(problem: Problem) -> str | None:
    """Why the kernels can't compute it, on whatever device."""
    if problem.dtype not in DTYPES:
        return f"q is {problem.dtype}, and the cuda backend computes torch.float16, torch.bfloat16 and torch.float32"
    if max(problem.head_dim, problem.head_dim_v) > LARGEST_HEAD_DIM:
        dims = f"head_dim is {problem.head_dim}, head_dim_v {problem.head_dim_v}"
        return f"{dims}, and the cuda backend computes up to {LARGEST_HEAD_DIM}"
    shape = f"q and k have {problem.batch} x {problem.heads} heads of {problem.seqlen_q} queries and {problem.seqlen_k} keys"
    if max(problem.seqlen_q, problem.seqlen_k) > MOST_ROWS:
        return f"{shape}, and the cuda backend computes up to {MOST_ROWS} rows a head"
    if _blocks(problem) > MOST_BLOCKS:
        return f"{shape}: a launch would have {_blocks(problem)} blocks, and a grid has at most {MOST_BLOCKS}"
    return None


def _blocks(problem: Problem) -> int:
    """Of the largest launch of a call, or a little more."""

    def tiles(seqlen: int, rows: int) -> int:
        return seqlen // rows + problem.batch if problem.packed else (seqlen // rows + 1) * problem.batch

    blocks = tiles(problem.seqlen_q, SMALLEST_TILE) * problem.heads
    if _is_split(problem):
        rows = problem.group * problem.seqlen_q // SPLIT_ROWS + 1
        blocks = max(blocks, _splits(problem)[1] * rows * problem.kv_heads * problem.batch)
    if not problem.gradients:
        return blocks
    keys = tiles(problem.seqlen_k, SMALLEST_TILE) * problem.kv_heads * PARTS
    pairs = 0 if problem.bias is None or "bias" not in problem.gradients else _bias_blocks(problem.bias, problem)
    return max(blocks, keys, pairs, tiles(problem.seqlen_q, DELTA_ROWS) * problem.heads)


def _bias_blocks(bias: Tensor, problem: Problem) -> int:
    """For the gradient of a bias: one for each tile of it, and one for all that a dimension of size 1 stands for."""
    tiles = (problem.batch, problem.heads, -(-problem.seqlen_q // SMALLEST_TILE), -(-problem.seqlen_k // FEWEST_KEYS))
    shape = tuple(bias.shape)
    return math.prod(count for size, count in zip((1,) * (4 - len(shape)) + shape, tiles, strict=True) if size != 1)


def _unserved(problem: Problem) -> str | None:
    """Why the kernels don't run on the GPU of the problem."""
    capability = problem.architecture or torch.cuda.get_device_capability(problem.device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the cuda backend needs 8.0 (Ampere) or later"
    if problem.architecture or not _built_for():  # a question about a GPU that is not here is one about every build
        return None
    return missing_code(_built_for(), capability)


def _queue(device: torch.device) -> tuple[int, int]:
    """The number of a device and the address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


@functools.cache
def _module() -> ModuleType:
    from . import _cuda

    return _cuda


@functools.cache
def _built_for() -> str:
    """The architectures in the compiled module; "" where there is none, which is another reason."""
    try:
        return str(_module().ARCHITECTURES)
    except ImportError:
        return ""


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
