"""The kernel launches of a call on a GPU that is not there: the product's own host code runs on meta tensors.

    launches(architecture, call)  ->  (kernel, arguments, options) of every launch, in order

Nothing else of the product is replaced than what asks a GPU: its name, and the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch


@dataclass(frozen=True)
class Pointer:
    """What Triton asks of a tensor argument before it compiles: its dtype, where it lies, how far it reaches."""

    dtype: torch.dtype
    offset: int  # bytes: an allocation begins on 16, a view into it may not
    bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        return cls(tensor.dtype, tensor.storage_offset() * tensor.itemsize, tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.bytes


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).removesuffix("_kernel")


def launches(architecture: str, call: Callable[[], object]) -> list[Launch]:
    """What `call`, which makes its tensors itself, on device "meta", launches on an architecture such as sm_90 or gfx942."""
    from fused_attention.triton_kernels import launch

    from fused_attention import triton_backend

    recorded: list[Launch] = []

    def submit(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        recorded.append(Launch(kernel, tuple(map(without_data, arguments)), options))

    with (
        mock.patch.object(launch, "submit", submit),
        mock.patch.object(triton_backend, "architecture", return_value=architecture),
        mock.patch.object(torch.version, "hip", "6.4" if architecture.startswith("gfx") else None),
    ):
        call()
    return recorded


def without_data(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return Pointer.of(argument)
    if isinstance(argument, tuple):
        fields = map(without_data, argument)
        return type(argument)(*fields) if hasattr(argument, "_fields") else tuple(fields)
    return argument
