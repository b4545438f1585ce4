"""What tells one call from another: the values of its arguments, and of tensors all but their memory, as a key that has a hash.

csrc/cpu/call_facts.h reads it as bytes, in a third of the time; where that is not there, it is a tuple.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch

from .problem import ORDINARY

SCALARS = frozenset((bool, int, float, str, NoneType))
DEEPEST = 16  # no option is a tuple of more than numbers, and the interpreter bears a thousand
Key = bytes | tuple[Any, ...]


def facts(arguments: tuple[Any, ...]) -> Key | None:
    """arguments: tensors, numbers, strings, None, and tuples of such. None where another is among them, or a tensor that has no strides."""
    # What a transform wraps has no memory, and the error that says so would take longer than any check.
    if torch._C._are_functorch_transforms_active():
        return listed(arguments)
    return _reader()(arguments) or listed(arguments)


def listed(arguments: tuple[Any, ...], depth: int = DEEPEST) -> tuple[Any, ...] | None:
    """The same in Python. Tuples that hold tuples deeper than that have no key, and the checks say what is wrong with them."""
    if depth == 0:
        return None
    found: list[tuple[Any, ...]] = []
    for x in arguments:
        kind = type(x)  # True equals 1, and the checks tell them apart
        if kind is tuple:
            inner = listed(x, depth - 1)
            if inner is None:
                return None
            found.append(inner)
        elif kind in ORDINARY:
            if x.layout is not torch.strided:
                return None
            try:
                found.append((x.shape, x.stride(), x.dtype, x.device, x.requires_grad))
            except RuntimeError:  # nested
                return None
        elif kind in SCALARS:
            found.append((kind, x))
        else:  # a tensor's subclass, say, which the key would keep alive
            return None
    return tuple(found)


@functools.cache
def _reader() -> Callable[[tuple[Any, ...]], bytes | None]:
    """The compiled one; without it, one that reads nothing: no module was built, or this PyTorch shows no tensor to C."""
    try:
        from . import _cpu

        return _cpu.call_facts(tuple(ORDINARY))
    except (ImportError, AttributeError, ValueError):  # ValueError: what it shows is of another kind
        return _nothing


def _nothing(arguments: tuple[Any, ...]) -> None:
    return None
