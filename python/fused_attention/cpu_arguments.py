"""A problem as the C++ kernels take it: tuples of addresses, strides and numbers, and the tensors that must outlive the call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import FAR, Problem

ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}  # Element of csrc/attention.h
UNBOUNDED = -1  # of a window
LARGEST_SOFTCAP = 1e30  # beyond it no score that float32 holds is bent by a rounding, and its scaling would overflow
WORDS = 2**32  # that a random word of dropout can be

View = tuple[int, ...]  # address, element, and four strides in elements
NOTHING: View = (0, 0, 0, 0, 0, 0)


def view(tensor: Tensor | None) -> View:
    """q, k, v or what is laid out like them; packed rows (total, heads, head_dim) all lie in one batch member."""
    if tensor is None:
        return NOTHING
    stride = tensor.stride()
    if len(stride) == 3:
        stride = (0, stride[1], stride[0], stride[2])
    return (tensor.data_ptr(), ELEMENTS[tensor.dtype], *stride)


def pairs_view(tensor: Tensor | None) -> View:
    """A mask or a bias, (seqlen_q, seqlen_k) or 4-D, whose dimensions of size 1 have stride 0."""
    if tensor is None:
        return NOTHING
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return (tensor.data_ptr(), ELEMENTS[tensor.dtype], *[0] * (4 - len(strides)), *strides)


class Arguments:
    """What forward and backward take alike."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> None:
        self._kept: list[Tensor] = []  # copies that the addresses point to
        cu_q, cu_k, lengths, heads = 0, 0, (problem.seqlen_q, problem.seqlen_k), problem.heads
        lse_batch = heads * lengths[0]
        if problem.packed:
            cu_q, cu_k, lse_batch = self._integers(problem.cu_seqlens_q), self._integers(problem.cu_seqlens_k), 0
        self.tensors = (view(q), view(k), view(v), view(out), lse.data_ptr(), lse_batch, lengths[0])
        dims = (problem.q.shape[-1], problem.v.shape[-1])
        self.sizes = (problem.batch, heads, problem.kv_heads, *lengths, *dims, cu_q, cu_k, problem.scale)
        self.visible = self._visible(problem)
        self.options = self._options(problem)

    def _visible(self, problem: Problem) -> tuple[int, ...]:
        """Window, kv_lengths and offset."""
        left = UNBOUNDED if problem.window_left is None else min(problem.window_left, FAR)
        right = UNBOUNDED if problem.window_right is None else min(problem.window_right, FAR)
        if problem.kv_lengths is None and problem.offset is None:
            return left, right, 0, 0, 0, 0, 0, 0
        starts, ends, stride = 0, self._integers(problem.kv_lengths), 1
        if problem.kv_lengths is not None and problem.kv_lengths.dim() == 2:
            starts, ends, stride = ends, ends + 8, 2
        if isinstance(problem.offset, Tensor):
            return left, right, starts, ends, stride, self._integers(problem.offset), 0, 0
        offset = max(-FAR, min(problem.offset or 0, FAR))
        return left, right, starts, ends, stride, 0, offset, int(problem.offset is not None)

    def _options(self, problem: Problem) -> tuple[Any, ...] | None:
        slopes, softcap, p = problem.alibi_slopes, problem.softcap or 0.0, problem.dropout_p
        by_pair = problem.mask is not None or problem.bias is not None or problem.dropout_seed is not None
        if not (by_pair or softcap or slopes is not None or problem.sinks is not None):
            return None
        return (
            pairs_view(problem.mask),
            pairs_view(problem.bias),
            self._reals(slopes, problem),
            problem.heads if slopes is not None and slopes.dim() == 2 else 0,
            self._reals(problem.sinks, problem),
            softcap if softcap <= LARGEST_SOFTCAP else 0.0,
            self._integers(problem.dropout_seed),
            min(int(p * WORDS), WORDS - 1),
            1 / (1 - p) if p < 1 else 0.0,
        )

    def _integers(self, tensor: Tensor | None) -> int:
        """The address of contiguous int64 values: a copy, for kernels clamp them more than once, and another thread may write to them."""
        if tensor is None:
            return 0
        return self._keep(tensor.to(torch.int64, copy=True, memory_format=torch.contiguous_format))

    def _reals(self, tensor: Tensor | None, problem: Problem) -> int:
        """The address of contiguous values of the type that sums are kept in."""
        return 0 if tensor is None else self._keep(tensor.to(problem.accumulate_dtype).contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
