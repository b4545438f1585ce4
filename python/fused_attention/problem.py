"""The facts of one attention call: shapes, strides, dtypes, options, and the gradients it needs.

A pair (query i, key j) of batch b and head h is visible iff

    start[b] <= j < end[b]   and   i + offset[b] - window_left <= j <= i + offset[b] + window_right   and   mask[b, h, i, j]

with [start, end) = [0, seqlen_k) or kv_lengths clamped to it, and offset = end - seqlen_q unless it is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

ORDINARY = frozenset((Tensor, torch.nn.Parameter))  # types whose sizes are numbers, not symbols, and that override nothing
FAR = 2**61  # a window or offset beyond it means the same as it, and sums of two stay inside int64


class AttentionOutput(NamedTuple):
    """out (batch, heads, seqlen_q, head_dim_v) and the natural-log lse (batch, heads, seqlen_q).

    Of packed sequences: (total, heads, head_dim_v) and (heads, total).
    """

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """One gradient an input, with its shape and dtype; None where it is not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


class Layout(NamedTuple):
    """Shape and strides (in elements) of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride())


class Problem(NamedTuple):
    """Everything a backend may know before it is asked to run."""

    q: Layout
    k: Layout
    v: Layout
    dtype: torch.dtype
    device: torch.device
    scale: float
    window_left: int | None = None  # None: unbounded
    window_right: int | None = None  # 0: causal
    offset: int | Tensor | None = None  # None: end - seqlen_q
    mask: Tensor | None = None
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None  # packed sequences: q is (total_q, heads, head_dim)
    cu_seqlens_k: Tensor | None = None
    gradients: frozenset[str] = frozenset()  # of "q", "k", "v", "bias", "alibi_slopes", "sinks"
    architecture: tuple[int, int] | None = None  # compute capability of a CUDA device, for a problem without tensors

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1 if self.cu_seqlens_q is not None else self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def seqlen_q(self) -> int:
        """Queries of every batch member; of a packed problem, the rows of all members together."""
        return self.q.shape[0] if self.packed else self.q.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[0] if self.packed else self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def hides(self) -> bool:
        """Whether some pair may be hidden: only then can a hidden NaN exist that must not leak."""
        hiders = (self.window_left, self.window_right, self.mask, self.bias, self.kv_lengths, self.cu_seqlens_q)
        return any(hider is not None for hider in hiders)


class Known(Problem):
    """A problem without tensors that later calls will have again; a copy with other facts has no notes."""

    notes: dict[str, Any] | None = None  # what a backend made of it, by the backend's name


def empty_output(q: Tensor, head_dim_v: int) -> Tensor:
    """An uninitialised out: the dimension order of torch.empty_like(q), with head_dim_v last. Fake and real kernels share it."""
    if head_dim_v == q.shape[-1]:
        return torch.empty_like(q)
    strides = torch.empty_like(q, device="meta").stride()
    order = sorted(range(q.dim()), key=lambda dim: strides[dim], reverse=True)
    shape = (*q.shape[:-1], head_dim_v)
    return q.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(q.dim())])


def empty_results(q: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """out and lse for a kernel to write; packed rows of no member, which nobody visits, hold what they have to."""
    out = empty_output(q, problem.head_dim_v)
    if not problem.packed:
        batch, heads, seqlen_q, _ = q.shape
        return out, torch.empty((batch, heads, seqlen_q), dtype=problem.accumulate_dtype, device=q.device)
    lse = q.new_full((problem.heads, problem.seqlen_q), -torch.inf, dtype=problem.accumulate_dtype)
    return out.zero_(), lse if problem.sinks is None else lse.copy_(problem.sinks[:, None])
