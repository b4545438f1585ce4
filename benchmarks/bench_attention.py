"""What a call costs before any kernel works: the public functions on shapes with almost nothing to compute.

    pytest -p pytest_benchmark.plugin benchmarks/bench_attention.py

The clock is the host's, so on a GPU these are the costs of a launch and not of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attention

BATCH, HEADS, SEQLEN, HEAD_DIM = 1, 2, 16, 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(*, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQLEN, HEAD_DIM, generator=generator).requires_grad_(gradients) for _ in range(3))
    return q, k, v


CALLS: dict[str, Callable[..., Any]] = {
    "attention": fused_attention.attention,
    "attention causal": lambda q, k, v: fused_attention.attention(q, k, v, causal=True),
    "attention_with_lse": fused_attention.attention_with_lse,
    "scaled_dot_product_attention": fused_attention.scaled_dot_product_attention,
    "torch SDPA": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("name", CALLS)
def test_cost_of_a_call(name: str, benchmark: Any) -> None:
    q, k, v = tensors()
    benchmark.group = "no gradient"
    benchmark(CALLS[name], q, k, v)


@pytest.mark.parametrize("name", CALLS)
def test_cost_of_a_call_that_needs_gradients(name: str, benchmark: Any) -> None:
    q, k, v = tensors(gradients=True)
    benchmark.group = "gradient, forward only"
    benchmark(CALLS[name], q, k, v)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention_with_lse"])
def test_cost_of_a_backward(name: str, benchmark: Any) -> None:
    q, k, v = tensors(gradients=True)
    out = CALLS[name](q, k, v)
    dout = torch.ones_like(out)
    benchmark.group = "backward"
    benchmark(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def test_cost_of_merging(benchmark: Any) -> None:
    q, k, v = tensors()
    part = fused_attention.attention_with_lse(q, k, v)
    outs, lses = torch.stack([part.out] * 2), torch.stack([part.lse] * 2)
    benchmark.group = "others"
    benchmark(fused_attention.merge_attention, outs, lses)


def test_cost_of_explaining(benchmark: Any) -> None:
    q, k, v = tensors()
    benchmark.group = "others"
    benchmark(fused_attention.explain, q, k, v)
