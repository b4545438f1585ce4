"""Who races: the product's own passes, which are the oracles of the others, and each experiment.

a variant    inputs -> a call that returns out and lse, or dk and dv, by name
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from fused_attention.benchmarks.workloads import AttentionInputs
from fused_attention.triton_kernels import backward, mask, tiles
from torch import Tensor

from fused_attention import attention_with_lse
from fused_attention.triton_backend import TritonBackend, architecture
from fused_attention.validation import check

from . import s_ahead, warp_specialized
from .grid import PLAIN
from .key_value import key_value

Call = Callable[[], dict[str, Tensor]]
Variant = Callable[[AttentionInputs], Call]


def plain(inputs: AttentionInputs) -> Call:
    q, k, v = detached(inputs)
    return lambda: attention_with_lse(q, k, v, causal=inputs.workload.causal, backend="triton")._asdict()


def experiment(forward: Callable[..., None], inputs: AttentionInputs) -> Call:
    q, k, v = detached(inputs)
    problem = check(q, k, v, causal=inputs.workload.causal)

    def call() -> dict[str, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        forward(q, k, v, out, lse, problem)
        return {"out": out, "lse": lse}

    return call


def plain_gradients(inputs: AttentionInputs) -> Call:
    """Delta, then dk and dv."""
    q, k, v = detached(inputs)
    made, dout = plain(inputs)(), inputs.dout
    problem = check(q, k.clone().requires_grad_(), v.clone().requires_grad_(), causal=inputs.workload.causal)

    def call() -> dict[str, Tensor]:
        found = TritonBackend().backward(dout, None, q, k, v, made["out"], made["lse"], problem)
        return {"dk": found.k, "dv": found.v}

    return call


def gradients_by_tma(inputs: AttentionInputs) -> Call:
    """The same delta, then dk and dv."""
    q, k, v = detached(inputs)
    made, dout = plain(inputs)(), inputs.dout
    problem = check(q, k, v, causal=inputs.workload.causal)
    tile = tiles.choose(architecture(q.device), "delta", q.shape[-1], q.itemsize, "tf32x3")

    def call() -> dict[str, Tensor]:
        delta = backward._delta(made["out"], dout, None, made["lse"], mask.sight(q, k, problem), tile)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        key_value(dout, q, k, v, made["lse"], delta, dk, dv, problem)
        return {"dk": dk, "dv": dv}

    return call


def detached(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.q.detach(), inputs.k.detach(), inputs.v.detach()


FORWARD: dict[str, Variant] = {
    PLAIN: plain,
    "s-ahead": functools.partial(experiment, s_ahead.forward),
    "warp-specialized": functools.partial(experiment, warp_specialized.forward),
    "ping-pong": functools.partial(experiment, functools.partial(warp_specialized.forward, ping_pong=True)),
}
GRADIENTS: dict[str, Variant] = {PLAIN: plain_gradients, "by TMA": gradients_by_tma}
GLUON = ("warp-specialized", "ping-pong")  # which nothing but a GPU can run
