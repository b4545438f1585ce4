"""What a memory check knows about memory: the elements a tensor argument reaches, and the history of each element of a buffer.

address = base + itemsize · Σ index · stride
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from math import prod

import numpy as np
import torch

NOBODY, SEVERAL = -1, -2  # as the writer or reader of an element, instead of the number of a program
LARGEST_TABLE = 1 << 24

# Quiet NaNs and large integers of a pattern that no computation yields, so that memory tells whether anything was written over it.
POISON = {
    torch.float16: 0x7EA5, torch.bfloat16: 0x7FE5, torch.float32: 0x7FE5A5A5, torch.float64: 0x7FFA5A5A5A5A5A5A,
    torch.int16: 0x7FA5, torch.int32: 0x7FA5A5A5, torch.int64: 0x7FA5A5A5A5A5A5A5,
}  # fmt: skip
BYTE_POISON = 0x7F


def living_storages() -> dict[int, torch.UntypedStorage]:
    """The memory of every tensor there is, by its address, which is taken as long as the storage is held."""
    storages = {}
    for tensor in [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]:
        with suppress(RuntimeError, NotImplementedError):  # some have none: sparse ones, and those of a transform that is over
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return storages


class Buffer:
    """Memory allocated under the check: which of its elements hold a value, and which programs of this launch wrote or read each."""

    def __init__(self, tensor: torch.Tensor, defined: bool) -> None:
        self.owner = tensor.untyped_storage()  # held, lest its address is given to another tensor
        self.start, self.itemsize = self.owner.data_ptr(), tensor.element_size()
        count = self.owner.nbytes() // self.itemsize
        self.poison = POISON.get(tensor.dtype, BYTE_POISON)
        self.bits = np.ctypeslib.as_array((ctypes.c_uint8 * (count * self.itemsize)).from_address(self.start)).view(f"u{self.itemsize}")
        self.defined = np.full(count, defined)
        if not defined:
            self.bits[:] = self.poison
        self.start_launch()

    def start_launch(self) -> None:
        self.writer, self.reader = np.full(self.bits.size, NOBODY), np.full(self.bits.size, NOBODY)
        self.notice_torch()

    def load(self, elements: np.ndarray, program: int) -> np.ndarray:
        """Which of the elements another program has written in this launch."""
        reader = self.reader[elements]
        self.reader[elements] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)
        return another(self.writer[elements], program)

    def store(self, elements: np.ndarray, program: int) -> np.ndarray:
        """Which of the elements another program has written or read in this launch."""
        conflicts = another(self.writer[elements], program) | another(self.reader[elements], program)
        self.writer[elements], self.defined[elements] = program, True
        return conflicts

    def notice_torch(self) -> None:
        """An element that lost its poison outside a kernel was written by an operation of torch."""
        self.defined |= self.bits != self.poison

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses - self.start) // self.itemsize

    def undefined_elements(self, tensor: torch.Tensor) -> int:
        self.notice_torch()
        strides = [stride * self.defined.itemsize for stride in tensor.stride()]
        return int(np.sum(~np.lib.stride_tricks.as_strided(self.defined[tensor.storage_offset() :], tensor.shape, strides)))


def another(programs: np.ndarray, program: int) -> np.ndarray:
    return (programs != NOBODY) & (programs != program)


class Region:
    """The elements that one tensor argument of a launch can reach, which may be fewer than its storage or its span hold."""

    def __init__(self, name: str, tensor: torch.Tensor, buffer: Buffer | None) -> None:
        self.name, self.buffer = name, buffer
        self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        axes = sorted((stride, size) for size, stride in zip(self.shape, self.strides, strict=True) if size > 1 and stride > 0)
        self.span = 0 if 0 in self.shape else 1 + sum((size - 1) * stride for stride, size in axes)
        self.table: np.ndarray | None = None
        self.offsets: np.ndarray | None = None
        if self.span == 0 or all(stride == prod(size for _, size in axes[:n]) for n, (stride, _) in enumerate(axes)):
            return
        sizes, strides = [size for _, size in axes], [stride for stride, _ in axes]
        if self.span <= LARGEST_TABLE:
            self.table = np.zeros(self.span, dtype=bool)
            np.lib.stride_tricks.as_strided(self.table, sizes, strides)[...] = True
            return
        offsets = np.zeros(1, dtype=np.int64)
        for stride, size in axes:
            offsets = np.add.outer(offsets, np.arange(size) * stride).reshape(-1)
        self.offsets = np.unique(offsets)

    def reaches(self, elements: np.ndarray) -> np.ndarray:
        """elements: offsets from the tensor's first element, in elements."""
        within = (elements >= 0) & (elements < self.span)
        if self.table is not None:
            return within & self.table[np.where(within, elements, 0)]
        if self.offsets is not None:
            return within & (self.offsets[np.searchsorted(self.offsets, np.where(within, elements, 0))] == elements)
        return within

    def __str__(self) -> str:
        return f"{self.name} of shape {self.shape} and strides {self.strides}"
