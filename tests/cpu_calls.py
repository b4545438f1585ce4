"""What the tests of the C++ CPU kernels share: a call with its tensors, its definition in float64, and the size of its rounding errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.cpu_backend import CpuBackend
from fused_attention.problem import Layout, Problem

CPU = CpuBackend()
MISSING = CPU.unavailable()
compiled = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
EPSILON = torch.finfo(torch.float32).eps
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Call:
    """One problem with its tensors."""

    q: Tensor  # (batch, heads, seqlen_q, head_dim)
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    options: dict[str, Any]

    @property
    def problem(self) -> Problem:
        layouts = {"q": Layout.of(self.q), "k": Layout.of(self.k), "v": Layout.of(self.v)}
        facts = {"scale": 0.25, "dtype": self.q.dtype, "device": self.q.device, "gradients": frozenset("qkv")} | layouts
        return Problem(**(facts | self.options))

    def run(self) -> dict[str, Tensor]:
        out, lse = CPU.forward(self.q, self.k, self.v, self.problem)
        gradients = CPU.backward(self.dout, self.dlse, self.q, self.k, self.v, out, lse, self.problem)
        return dict(zip(NAMES, (out, lse, gradients.q, gradients.k, gradients.v), strict=True))

    def to(self, dtype: torch.dtype) -> Call:
        return self.but(**{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")})

    def but(self, **changes: Any) -> Call:
        return Call(**({name: getattr(self, name) for name in self.__dataclass_fields__} | changes))


def make(
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    **options: Any,
) -> Call:
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k * 10 + head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = head_dim if head_dim_v is None else head_dim_v
    return Call(
        q=normal(batch, heads, seqlen_q, head_dim),
        k=normal(batch, kv_heads, seqlen_k, head_dim),
        v=normal(batch, kv_heads, seqlen_k, wide),
        dout=normal(batch, heads, seqlen_q, wide),
        dlse=normal(batch, heads, seqlen_q),
        options={"scale": head_dim**-0.5} | options,
    )


def visible(problem: Problem) -> Tensor:
    """(batch, seqlen_q, seqlen_k), pair by pair from the definition."""
    batch, seqlen_q, seqlen_k = problem.batch, problem.seqlen_q, problem.seqlen_k
    result = torch.zeros(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        start, end = 0, seqlen_k
        if problem.kv_lengths is not None:
            given = problem.kv_lengths[b].tolist()
            start, end = (min(max(x, 0), seqlen_k) for x in (given if isinstance(given, list) else (0, given)))
        offset = problem.offset[b].item() if isinstance(problem.offset, Tensor) else problem.offset
        offset = end - seqlen_q if offset is None else offset
        for i in range(seqlen_q):
            lowest = start if problem.window_left is None else max(start, i + offset - problem.window_left)
            highest = end if problem.window_right is None else min(end, i + offset + problem.window_right + 1)
            result[b, i, max(lowest, 0) : max(highest, 0)] = True
    return result


def definition(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every result in float64, and the magnitude that its rounding errors scale with."""
    problem, group = call.problem, call.problem.group
    q, dout = call.q.double(), call.dout.double()
    k, v = (x.double().repeat_interleave(group, 1) for x in (call.k, call.v))
    dlse = torch.zeros(q.shape[:3]).double() if call.dlse is None else call.dlse.double()
    seen = visible(problem)[:, None]
    scores = (problem.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    out = p @ v
    dscores = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True) + dlse[..., None])
    largest = (abs(problem.scale) * q.abs() @ k.abs().mT).masked_fill(~seen, 0.0)
    growth = 1 + (
        largest.amax(-1, keepdim=True) if largest.shape[-1] else torch.zeros(*q.shape[:3], 1)
    )  # what an error of the scores does to p
    rough = p * growth * (dout.abs() @ v.abs().mT + (dout.abs() * (p @ v.abs())).sum(-1, keepdim=True) + dlse.abs()[..., None])

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    truth = {"out": out, "lse": lse, "dq": problem.scale * dscores @ k}
    truth |= {"dk": shared(problem.scale * dscores.mT @ q), "dv": shared(p.mT @ dout)}
    size = {"out": growth * (p @ v.abs()), "lse": growth[..., 0], "dq": abs(problem.scale) * rough @ k.abs()}
    size |= {"dk": shared(abs(problem.scale) * rough.mT @ q.abs()), "dv": shared((p * growth).mT @ dout.abs())}
    return truth, size


def check(call: Call) -> dict[str, Tensor]:
    """Runs a call and holds every element to a few roundings of its magnitude."""
    results = call.run()
    truth, size = definition(call)
    for name, expected in truth.items():
        got = results[name]
        assert got.shape == expected.shape, name
        assert got.dtype == torch.float32, name
        error = torch.where(got == expected, 0.0, (got - expected).abs())
        worst = (error / (EPSILON * size[name] + 1e-37)).max().item() if got.numel() else 0.0
        assert worst <= 6, f"{name} is off by {worst:.1f} roundings"
    return results


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), name
