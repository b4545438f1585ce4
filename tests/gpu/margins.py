"""Tensors inside larger buffers full of 0xff bytes, NaN or -1: who reads outside shows it in the result, who writes, in the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

FILLER = 0xFF
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "zeros"), (torch, "zeros_like"), (torch, "full"), (torch, "full_like"))
METHODS = ("new_empty", "new_zeros", "new_full")


@dataclass(frozen=True)
class Placed:
    """A tensor and the bytes around it and in its gaps, which nobody may write."""

    name: str
    buffer: Tensor  # bytes
    outside: Tensor  # bool, a byte each

    def damaged(self) -> bool:
        return bool((self.buffer[self.outside] != FILLER).any())


class Margins:
    """Hands out placed tensors; `margin` elements lie before and after each, 512 keeping every alignment and 513 none."""

    def __init__(self, device: torch.device, margin: int) -> None:
        self._device, self._margin = device, margin
        self._filled = torch.full  # as it was before anyone replaced it
        self.placed: list[Placed] = []

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The same values, strides included, in a buffer of their own."""
        made = self._place(name, tensor)
        made.copy_(tensor)
        return made

    def _place(self, name: str, like: Tensor) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        count, itemsize = extent + 2 * self._margin, like.element_size()
        buffer = self._filled((count * itemsize,), FILLER, dtype=torch.uint8, device=self._device)
        outside = self._filled((count,), True, dtype=torch.bool, device=self._device)
        outside.as_strided(like.shape, like.stride(), self._margin).fill_(False)
        self.placed.append(Placed(name, buffer, outside.repeat_interleave(itemsize)))
        return buffer.view(like.dtype).as_strided(like.shape, like.stride(), self._margin)

    def damaged(self) -> list[str]:
        return [placed.name for placed in self.placed if placed.damaged()]

    def catch_allocations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on what Python allocates on the device has margins too; what was asked for empty is full of NaN."""
        for owner, name in (*ALLOCATORS, *((torch.Tensor, method) for method in METHODS)):
            monkeypatch.setattr(owner, name, self._caught(getattr(owner, name), name))

    def _caught(self, allocate: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            made = allocate(*args, **kwargs)
            if made.device != self._device or type(made) is not Tensor or not made.numel():
                return made
            caught = self._place(f"{name} {tuple(made.shape)}", made)
            return caught if "empty" in name else caught.copy_(made)

        return allocated
