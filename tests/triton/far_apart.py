"""Tensors that span gigabytes and touch a few pages, to see what becomes of addresses past 2**31 elements."""

from __future__ import annotations

import mmap

import torch

STRIDE = 1 << 30
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number: Python knows it by name only since 3.13


def far_apart(values: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values, those of one axis 2**30 elements apart in memory that nobody reserves."""
    strides, stride = [0] * values.dim(), 1
    for other in reversed(range(values.dim())):
        if other != axis:
            strides[other], stride = stride, stride * values.shape[other]
    strides[axis] = STRIDE
    count = 1 + sum((size - 1) * step for size, step in zip(values.shape, strides, strict=True))
    pages = mmap.mmap(-1, count * values.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(pages, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)
