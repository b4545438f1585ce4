"""The compiled kernels of csrc/cpu/bindings.cpp: addresses and strides, nothing is checked."""

Tensor = tuple[int, ...]  # the address, and the strides of batch, head, row and column

def isa() -> str: ...
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: int,
    sizes: tuple[int, ...],
    visible: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: int,
    sizes: tuple[int, ...],
    visible: tuple[int, ...],
    scale: float,
    threads: int,
    dout: Tensor,
    dlse: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    /,
) -> None: ...
