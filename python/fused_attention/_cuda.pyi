"""The compiled kernels of csrc/cuda/bindings.cpp: addresses, strides and a stream, nothing is checked."""

from typing import Any

Arguments = tuple[Any, ...]  # as cpu_arguments.py makes them

ARCHITECTURES: str  # that the kernels are compiled for, as FUSED_ATTENTION_CUDA_ARCHS names them

def available() -> tuple[int, str, int, int]: ...
def kernels() -> list[tuple[str, int, int]]: ...
def forward(tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, device: int, stream: int, /) -> None: ...
def forward_split(
    tensors: Arguments,
    sizes: Arguments,
    visible: Arguments,
    options: Arguments | None,
    split: tuple[int, int, int],
    pages: tuple[int, ...],
    device: int,
    stream: int,
    /,
) -> None: ...
def backward(
    tensors: Arguments,
    sizes: Arguments,
    visible: Arguments,
    options: Arguments | None,
    gradients: Arguments,
    device: int,
    stream: int,
    /,
) -> None: ...
