"""Sizes that overflow: more elements than int32 counts, strides beyond it, more heads than a grid has rows, a million tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention_with_lse
from fused_attention.testing import Case, Inputs, check
from fused_attention.testing.separable import Separable, separable

from .target import Target

INT32 = 2**31
MILLION = 2**20 + 7
RecordProperty = Callable[[str, object], None]


def need(gibibytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"{free:.0f} GiB of the GPU's memory are free, and this needs {gibibytes}")


def test_more_elements_than_int32_counts(gpu: Target) -> None:
    """And more batch * heads than 65535; members repeat, so that each must equal the first of its kind."""
    need(56)
    kinds, batch = 257, 65_539
    small = Case("kind", batch=kinds, heads=8, kv_heads=4, seqlen_q=33, seqlen_k=33, head_dim=128, causal=True, dtype=torch.bfloat16)
    base = small.make(gpu.device).changed(dlse=None)
    first = base.run(gpu.backend)
    few = base.changed(**{name: getattr(base, name)[:2] for name in ("q", "k", "v", "dout")})
    check({name: tensor[:2] for name, tensor in first.items()}, few.truth())

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(batch // kinds + 1, 1, 1, 1)[:batch].clone()

    large = base.changed(**{name: repeated(getattr(base, name)) for name in ("q", "k", "v", "dout")})
    assert large.q.numel() > INT32
    for name, tensor in large.run(gpu.backend).items():
        wrong = [at for at in range(0, batch, kinds) if not torch.equal(tensor[at : at + kinds], first[name][: batch - at])]
        assert not wrong, f"{name} differs from member {wrong[0]} on"


FAR: dict[str, tuple[int, int, int]] = {  # strides of batch, head and seq
    "batch": (INT32 + 64, 2**16, 512),
    "head": (2**16, INT32 + 64, 512),
    "seq": (2**9, 2**10, 2**26 + 64),
    "batch, head and seq": (INT32 + 64, 2**30 + 2**20, 2**25 + 64),
}


@pytest.mark.parametrize("axis", FAR)
def test_strides_beyond_int32(axis: str, gpu: Target) -> None:
    need(14)
    case = Case("far", heads=2, seqlen_q=65, seqlen_k=65, head_dim=64, causal=True, dtype=torch.bfloat16)
    inputs = case.make(gpu.device)
    strides = (*FAR[axis], 1)
    extent = sum((size - 1) * stride for size, stride in zip(inputs.q.shape, strides, strict=True)) + 1
    assert extent > INT32
    memory = torch.empty(extent + 4 * 64, dtype=torch.bfloat16, device=gpu.device)

    def far(tensor: Tensor, place: int) -> Tensor:
        return memory.as_strided(tensor.shape, strides, place * 64).copy_(tensor)

    placed = inputs.changed(**{name: far(getattr(inputs, name), place) for place, name in enumerate(("q", "k", "v", "dout"))})
    check(placed.run(gpu.backend), inputs.truth())


def run(problem: Separable, machine: Target, *, backward: bool) -> dict[str, Tensor]:
    options: dict[str, Any] = problem.options
    if backward:
        return Inputs(problem.q, problem.k, problem.v, options, problem.dout, problem.dlse).run(machine.backend)
    return attention_with_lse(problem.q, problem.k, problem.v, **options, backend=machine.backend)._asdict()


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window": (4095, None)}, {"window": (100, 50)}, {"causal": True, "reach": 4096.0}],
    ids=str,
)
def test_a_million_tokens(options: dict[str, Any], machine: Target, record_property: RecordProperty) -> None:
    if not machine.rehearsed:
        need(24)
    seqlen = MILLION if not machine.rehearsed else 257
    problem = separable(seqlen, seqlen, head_dim=64, device=machine.device, **options)
    record_property("used", problem.check(run(problem, machine, backward=True)).used)


def test_a_million_tokens_in_float32(machine: Target, record_property: RecordProperty) -> None:
    """Sums of a million weights: what bfloat16 would hide."""
    if not machine.rehearsed:
        need(24)
    seqlen = MILLION // 4 if not machine.rehearsed else 257
    problem = separable(seqlen, seqlen, head_dim=64, causal=True, dtype=torch.float32, device=machine.device)
    record_property("used", problem.check(run(problem, machine, backward=True)).used)


def test_one_query_over_more_key_elements_than_int32_counts(machine: Target, record_property: RecordProperty) -> None:
    if not machine.rehearsed:
        need(32)
    seqlen_k = 2**24 + 3 if not machine.rehearsed else 1031
    problem = separable(3, seqlen_k, head_dim=128, head_dim_v=16, device=machine.device)
    assert machine.rehearsed or problem.k.numel() > INT32
    record_property("used", problem.check(run(problem, machine, backward=False)).used)
