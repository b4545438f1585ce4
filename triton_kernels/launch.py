"""The one place where a kernel is launched: a one-dimensional grid, on the current stream of the tensors' own device."""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `programs` programs of a kernel; none at all is legal and launches nothing."""
    if programs == 0:
        return
    options = {**constants, "num_warps": num_warps, "num_stages": num_stages}
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        submit(kernel, (programs,), arguments, options)
        return
    with torch.cuda.device(device):
        submit(kernel, (programs,), arguments, options)


def submit(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[grid](*arguments, **options)
