"""What the tests of this folder run on: triton or cuda on a GPU, or in a rehearsal any backend on the CPU with small sizes.

FUSED_ATTENTION_GPU_BACKEND=cuda pytest tests/gpu      the CUDA kernels in the place of Triton's
FUSED_ATTENTION_REHEARSE=torch pytest tests/gpu        tries every test body that needs no GPU
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from fused_attention.testing import Case

REHEARSAL, BACKEND = "FUSED_ATTENTION_REHEARSE", "FUSED_ATTENTION_GPU_BACKEND"
LARGEST_REHEARSED, SAMPLED = 47, 8
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    device: torch.device
    backend: str
    rehearsed: bool

    def size(self, wanted: int) -> int:
        """A length: as wanted on a GPU, and in a rehearsal one that a CPU manages."""
        return wanted if not self.rehearsed or wanted <= LARGEST_REHEARSED else LARGEST_REHEARSED - wanted % 7

    def count(self, wanted: int) -> int:
        """How often something is repeated."""
        return min(wanted, 2) if self.rehearsed else wanted


def target() -> Target | None:
    """None: there is neither a GPU nor a rehearsal."""
    rehearsed = os.environ.get(REHEARSAL)
    if rehearsed:
        return Target(torch.device("cpu"), rehearsed, rehearsed=True)
    backend = os.environ.get(BACKEND, "triton")
    return Target(torch.device("cuda", 0), backend, rehearsed=False) if torch.cuda.is_available() else None


def sample(problems: list[T]) -> list[T]:
    """All problems, or a few of them in a rehearsal."""
    return problems[:: max(1, len(problems) // SAMPLED)] if os.environ.get(REHEARSAL) else problems


def at_size(case: Case, machine: Target) -> Case:
    """A case with each of its lengths as the target manages it."""
    if not machine.rehearsed:
        return case

    def sizes(lengths: Any) -> Any:
        if lengths is None or isinstance(lengths, int):
            return None if lengths is None else machine.size(lengths)
        return tuple(sizes(length) for length in lengths)

    return replace(
        case,
        seqlen_q=machine.size(case.seqlen_q),
        seqlen_k=machine.size(case.seqlen_k),
        head_dim=machine.size(case.head_dim),
        head_dim_v=sizes(case.head_dim_v),
        lengths_q=sizes(case.lengths_q),
        lengths_k=sizes(case.lengths_k),
        kv_lengths=sizes(case.kv_lengths),
    )
