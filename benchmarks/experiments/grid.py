"""Where the experiments race: lengths by head_dim, causal or not, in the order in which they matter should time run out."""

from __future__ import annotations

from dataclasses import replace

from fused_attention.benchmarks.workloads import Workload

PLAIN, TIMING = "plain", "timing"  # the variant that is the oracle of the others; what follows the checks


def cell(head_dim: int, causal: bool, seqlen: int, batch: int = 1, heads: int = 64, kv_heads: int = 8, gradients: bool = False) -> Workload:
    grouped = "" if heads != kv_heads else " ungrouped"
    name = f"d{head_dim} {'causal' if causal else 'full'} {seqlen // 1024}k{grouped}"
    name += " dk dv" if gradients else ""
    return Workload(name, "an experiment", batch, heads, seqlen, seqlen, head_dim, kv_heads=kv_heads, causal=causal, backward=gradients)


GRID = (
    cell(128, True, 4096),
    cell(128, False, 4096),
    cell(64, True, 4096),
    cell(128, True, 4096, gradients=True),
    cell(128, True, 16384),
    cell(128, True, 2048),
    cell(64, True, 4096, gradients=True),
    cell(256, True, 4096),
    cell(256, True, 4096, gradients=True),
    cell(128, True, 8192),
    cell(128, False, 16384),
    cell(64, False, 16384),
    cell(128, True, 8192, batch=2, heads=32, kv_heads=32),
    cell(128, True, 1024, batch=4),
    cell(256, False, 8192),
    cell(64, True, 1024, batch=4),
    cell(128, True, 32768),
)


def rehearsal(workload: Workload) -> Workload:
    """The same call, small enough for Triton's interpreter."""
    return replace(workload, batch=1, heads=2, kv_heads=1, seqlen_q=128, seqlen_k=128, head_dim=64)
