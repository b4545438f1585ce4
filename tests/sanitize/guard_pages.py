"""Tensors that lie against an unreadable page, so that a kernel's first byte outside of one ends the process.

    end         | tensor |XXXX         beginning    XXXX| tensor |

One tensor has one such side at a time, for its size is no multiple of a page's.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Side = Literal["end", "beginning"]
Result = TypeVar("Result")

libc = ctypes.CDLL(None, use_errno=True)
UNREADABLE = 0  # PROT_NONE


def against_a_page(tensor: Tensor, side: Side) -> Tensor:
    """The same values with the same strides, whose last or first byte borders on a page that nobody can read; nothing lies between rows."""
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (first, first + mmap.PAGESIZE + inside):
        if libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, UNREADABLE):
            raise OSError(ctypes.get_errno(), "mprotect refuses to make a page unreadable")
    offset = mmap.PAGESIZE + (inside - size if side == "end" else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=offset)
    flat.copy_(tensor.detach().as_strided((span,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


class AgainstPages(TorchDispatchMode):
    """Moves the result of every operator that made new memory; what is said to be empty holds NaN, or 1 bits."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {storage_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        empty = func.overloadpacket.__name__.startswith(("empty", "new_empty"))

        def move(tensor: Tensor) -> Tensor:
            if storage_of(tensor) in known:
                return tensor
            if empty:
                tensor.fill_(math.nan if tensor.is_floating_point() else -1)
            return against_a_page(tensor, self.side)

        return tree_map_only(Tensor, move, func(*args, **kwargs))


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def guarded(function: Callable[..., Result], side: Side) -> Callable[..., Result]:
    """The function on moved arguments, with everything that it allocates moved too."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        args, kwargs = tree_map_only(Tensor, lambda tensor: against_a_page(tensor, side), (args, kwargs))
        with AgainstPages(side):
            return function(*args, **kwargs)

    return call
