"""The layer's fused operations beside PyTorch's own on the shapes of a layer: linear, add and normalise, gates, rotation.

    OMP_NUM_THREADS=1 pytest -p pytest_benchmark.plugin benchmarks/bench_layer_ops.py

Forward without gradients and backward apart, one thread, in pairs: what counts is the ratio of the two lines of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention import layer_ops

from .timing import keep_freed_memory

ROWS, WIDTH, HIDDEN, HEADS, HEAD_DIM = 1024, 512, 2048, 8, 64
EPS = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, (WIDTH,), weight, bias, EPS)


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x + residual, (WIDTH,), weight, EPS)


def torch_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def torch_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]  # ours, PyTorch's, the shapes of the inputs
PAIRS: dict[str, Pair] = {
    "linear": (layer_ops.linear, F.linear, [(ROWS, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,)]),
    "linear + GELU": (
        lambda x, weight, bias: layer_ops.linear(x, weight, bias, activation="gelu"),
        lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        [(ROWS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,)],
    ),
    "linear + SwiGLU": (
        lambda x, weight: layer_ops.linear(x, weight, activation="swiglu"),
        lambda x, weight: torch_swiglu(F.linear(x, weight)),
        [(ROWS, WIDTH), (2 * HIDDEN, WIDTH)],
    ),
    "linear of many inputs": (layer_ops.linear, F.linear, [(ROWS, HIDDEN), (WIDTH, HIDDEN), (WIDTH,)]),
    "add + LayerNorm": (
        lambda x, residual, weight, bias: layer_ops.add_norm(x, residual, weight, bias, eps=EPS).out,
        torch_add_norm,
        [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,), (WIDTH,)],
    ),
    "add + RMSNorm": (
        lambda x, residual, weight: layer_ops.add_norm(x, residual, weight, eps=EPS, kind="rms").out,
        torch_add_rms_norm,
        [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,)],
    ),
    "SwiGLU": (layer_ops.gated, torch_swiglu, [(ROWS, 2 * HIDDEN)]),
    "rotate": (layer_ops.rotate, torch_rotate, [(1, HEADS, ROWS, HEAD_DIM), (ROWS, HEAD_DIM // 2), (ROWS, HEAD_DIM // 2)]),
}
WHO = ("ours", "torch")


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", PAIRS)
def test_forward(name: str, who: str, benchmark: Any) -> None:
    *functions, shapes = PAIRS[name]
    inputs = tensors(*shapes)
    benchmark.group = f"{name}, forward"
    with torch.no_grad():
        benchmark(functions[WHO.index(who)], *inputs)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("name", PAIRS)
def test_backward(name: str, who: str, benchmark: Any) -> None:
    *functions, shapes = PAIRS[name]
    leaves = [x.requires_grad_() for x in (tensors(*shapes)[:1] if name == "rotate" else tensors(*shapes))]
    out = functions[WHO.index(who)](*leaves, *tensors(*shapes)[len(leaves) :])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    benchmark.group = f"{name}, backward"
    benchmark(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
