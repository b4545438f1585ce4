"""The benchmark's FLOPs: what a count of the visible pairs, one by one, and of a module's weights says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fused_attention.benchmarks import contenders, workloads
from fused_attention.benchmarks.workloads import Workload

CAUSAL = Workload("tiny-causal", "tiny causal", 2, 6, 23, 23, 16, kv_heads=3, causal=True)
PADDED = Workload("tiny-padded", "tiny padded", 2, 4, 19, 29, 8, kv_lengths=(29, 11))
SQUARE = Workload("tiny-square", "tiny square", 2, 2, 21, 21, 8, causal=True, module="layer")


def pairs_one_by_one(workload: Workload) -> int:
    seen = 0
    for member in range(workload.batch):
        end = workload.seqlen_k if workload.kv_lengths is None else min(workload.kv_lengths[member], workload.seqlen_k)
        for i in range(workload.seqlen_q):
            seen += sum(j < end and (not workload.causal or j <= i + end - workload.seqlen_q) for j in range(workload.seqlen_k))
    return seen * workload.heads


@pytest.mark.parametrize(
    "workload",
    [
        CAUSAL,
        PADDED,
        replace(CAUSAL, seqlen_q=7),
        replace(CAUSAL, seqlen_k=11),
        replace(CAUSAL, kv_lengths=(5, 40)),
        replace(PADDED, kv_lengths=(0, 1)),
        replace(PADDED, seqlen_q=1),
    ],
    ids=lambda workload: workload.shape(),
)
def test_flops_count_visible_pairs(workload: Workload) -> None:
    pairs = pairs_one_by_one(workload)
    assert workloads.visible_pairs(workload) == pairs
    assert workloads.attention_flops(workload, "forward") == 4 * workload.head_dim * pairs
    assert workloads.attention_flops(workload, "backward") == 10 * workload.head_dim * pairs


@pytest.mark.parametrize("name", sorted(set(workloads.WORKLOADS)))
def test_named_workloads_count_what_their_masks_show(name: str) -> None:
    workload = replace(workloads.WORKLOADS[name])
    visible = workloads.attention_inputs(workload, torch.float32, 0).visible
    shape = (workload.batch, workload.heads, workload.seqlen_q, workload.seqlen_k)
    assert workloads.visible_pairs(workload) == math.prod(shape) if visible is None else int(visible.expand(shape).sum())


def test_module_flops_are_those_of_its_weights() -> None:
    module = contenders.torch_module(SQUARE, torch.float32, 0)
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
    tokens = SQUARE.batch * SQUARE.seqlen_q
    assert workloads.module_flops(SQUARE, "forward") - workloads.attention_flops(SQUARE, "forward") == 2 * tokens * weights
