"""The same bits again: run after run, and for a sequence alone, in a batch, at another place in it, beside other neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.testing import Case, Inputs

from .target import Target, at_size

FORWARD_RUNS, BACKWARD_RUNS = 100, 50
SHAPE: dict[str, Any] = {"batch": 2, "heads": 8, "kv_heads": 2, "seqlen_q": 1031, "seqlen_k": 1031, "dtype": torch.bfloat16}
REPEATED = (
    Case("causal-64", **SHAPE, head_dim=64, causal=True),
    Case("full-128", **SHAPE, head_dim=128),
    Case("causal-256", **SHAPE, head_dim=256, causal=True),
    Case("window-128", **SHAPE, head_dim=128, causal=True, window=(200, None)),
    Case("bias-64", **SHAPE, head_dim=64, bias="1h1k"),
    Case("dropout-sinks-alibi-64", **SHAPE, head_dim=64, dropout_p=0.1, sinks=True, alibi_slopes="h"),
    Case("packed-128", heads=8, kv_heads=2, lengths_q=(515, 0, 1031, 1, 129), head_dim=128, causal=True, dtype=torch.bfloat16),
    Case("decode-128", **(SHAPE | {"seqlen_q": 1, "seqlen_k": 8195}), head_dim=128),
    Case("fp32-64", **(SHAPE | {"dtype": torch.float32}), head_dim=64, causal=True),
)
MEMBERS = 5
BATCHED: dict[str, Any] = SHAPE | {"batch": MEMBERS}
INVARIANT = (
    Case("causal-64", **BATCHED, head_dim=64, causal=True),
    Case("full-128", **BATCHED, head_dim=128),
    Case("window-256", **BATCHED, head_dim=256, causal=True, window=(200, None)),
    Case("kv-lengths-128", **BATCHED, head_dim=128, kv_lengths=(1031, 7, 640, 1000, 64)),
    Case("decode-128", **(BATCHED | {"seqlen_q": 1, "seqlen_k": 4099}), head_dim=128, kv_lengths=(4099, 7, 640, 3001, 64)),
    Case("few-queries-64", **(BATCHED | {"seqlen_q": 3, "seqlen_k": 4099}), head_dim=64),
    Case("fp32-64", **(BATCHED | {"dtype": torch.float32}), head_dim=64, causal=True),
)


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case.name)
def test_every_run_gives_the_same_bits(case: Case, machine: Target) -> None:
    inputs = at_size(case, machine).make(machine.device)
    first = inputs.run(machine.backend)
    for run in range(machine.count(BACKWARD_RUNS)):
        assert not differing(inputs.run(machine.backend), first), f"run {run} of forward and backward"
    forward = {name: first[name] for name in ("out", "lse")}
    for run in range(machine.count(FORWARD_RUNS)):
        assert not differing(inputs.run(machine.backend, backward=False), forward), f"forward run {run}"


def members(inputs: Inputs, chosen: list[int]) -> Inputs:
    """The inputs of some members of the batch, in the order given."""
    lengths = inputs.options.get("kv_lengths")
    options = {} if lengths is None else {"kv_lengths": lengths[chosen].contiguous()}
    tensors = {name: getattr(inputs, name)[chosen].contiguous() for name in ("q", "k", "v", "dout", "dlse")}
    return inputs.changed(**tensors, options=options)


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_a_sequence_does_not_feel_its_batch(case: Case, machine: Target) -> None:
    inputs = at_size(case, machine).make(machine.device)
    together = inputs.run(machine.backend)
    for member in (0, 3, MEMBERS - 1):
        alone = members(inputs, [member]).run(machine.backend)
        assert not differing(alone, {name: tensor[member : member + 1] for name, tensor in together.items()}), f"member {member} alone"
    order = [4, 2, 0, 3, 1]
    moved = members(inputs, order).run(machine.backend)
    assert not differing(moved, {name: tensor[order] for name, tensor in together.items()}), "members in another order"


def test_a_packed_sequence_does_not_feel_its_place(machine: Target) -> None:
    if machine.backend == "torch":
        pytest.skip("torch's own matrix products give other bits at other places")
    lengths = tuple(machine.size(length) for length in (515, 1031, 129))
    case = Case("packed", heads=8, kv_heads=2, lengths_q=lengths, head_dim=64, causal=True, dtype=torch.bfloat16)
    inputs = case.make(machine.device)
    parts = {name: getattr(inputs, name).split(lengths) for name in ("q", "k", "v", "dout")}
    reversed_lengths = torch.tensor((0, *lengths[::-1]), device=machine.device).cumsum(0).to(torch.int32)
    turned = inputs.changed(
        **{name: torch.cat(part[::-1]) for name, part in parts.items()},
        dlse=torch.cat(inputs.dlse.split(lengths, dim=1)[::-1], dim=1).contiguous(),
        options={"cu_seqlens_q": reversed_lengths},
    )
    first, second = inputs.run(machine.backend), turned.run(machine.backend)
    for name, tensor in first.items():
        dim = 1 if name == "lse" else 0
        assert torch.equal(torch.cat(second[name].split(lengths[::-1], dim)[::-1], dim), tensor), name
