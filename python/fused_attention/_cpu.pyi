"""The compiled kernels of csrc/cpu/*bindings.cpp: addresses and strides, nothing is checked."""

from collections.abc import Callable
from typing import Any

Tensor = tuple[int, ...]  # the address, and the strides of batch, head, row and column
Arguments = tuple[Any, ...]  # as cpu_arguments.py makes them

def isa() -> str: ...
def multiply_adds(steps: int, /) -> float: ...  # of vectors alone, for benchmarks: how many operations that were
def forward(tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, threads: int, /) -> None: ...
def prepare(
    tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, /
) -> Callable[[int, int, int, int, int, int], None]: ...  # on the addresses of q, k, v, out and lse, 0 for none, and threads
def backward(
    tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, threads: int, gradients: Arguments, /
) -> None: ...
def weights(
    tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, threads: int, average: bool, /
) -> None: ...
def decode_pages(
    tensors: Arguments, sizes: Arguments, visible: Arguments, options: Arguments | None, threads: int, pages: Arguments, /
) -> bool: ...
def call_facts(types: tuple[type, ...], /) -> Callable[[tuple[Any, ...]], bytes | None]: ...

Matrix = tuple[int, int, int]  # the address, and the strides of rows and columns; 0 for none

def product(
    a: Matrix,
    b: Matrix,
    out: Matrix,
    residual: Matrix,
    sums: Matrix,
    bias: int,
    sizes: tuple[int, int, int],
    activation: int,
    gated: bool,
    threads: int,
    /,
) -> None: ...
def add_norm(
    x: Matrix,
    residual: Matrix,
    summed: Matrix,
    out: Matrix,
    vectors: tuple[int, int, int, int],
    sizes: tuple[int, int],
    eps: float,
    threads: int,
    /,
) -> None: ...
def add_norm_backward(
    dout: Matrix,
    dsummed: Matrix,
    summed: Matrix,
    dx: Matrix,
    dweight: Matrix,
    dbias: Matrix,
    vectors: tuple[int, int, int],
    sizes: tuple[int, int],
    threads: int,
    /,
) -> None: ...
def activate(gate: Matrix, value: Matrix, out: Matrix, sizes: tuple[int, int], activation: int, threads: int, /) -> None: ...
def activate_backward(
    dout: Matrix, gate: Matrix, value: Matrix, dgate: Matrix, dvalue: Matrix, sizes: tuple[int, int], activation: int, threads: int, /
) -> None: ...
def sum_rows(x: Matrix, out: int, sizes: tuple[int, int], threads: int, /) -> None: ...
def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...], interleaved: bool, inverse: bool, threads: int, /
) -> None: ...
