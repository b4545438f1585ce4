"""The shared case list on the GPU: every option and pair of options, forward and all gradients, within the bounds of the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fused_attention.testing import CASES, Case, check

from .target import Target, sample

TYPES = (torch.bfloat16, torch.float32, torch.float16)
PLAIN = [case for case in CASES if case.dtype is torch.float32]
# Every case in one type before any in a second: should time run out, each has run.
ROUNDS = [replace(case, dtype=TYPES[(at + turn) % len(TYPES)]) for turn in range(len(TYPES)) for at, case in enumerate(PLAIN)]
PROBLEMS = [*(case for case in CASES if case.dtype is torch.float64), *ROUNDS]


def name(case: Case) -> str:
    return f"{case.name}-{str(case.dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("case", sample(PROBLEMS), ids=name)
def test_a_case_equals_the_oracle(case: Case, machine: Target, record_property: Callable[[str, object], None]) -> None:
    inputs = case.make(machine.device)
    if case.dtype is torch.float64 and not machine.rehearsed:
        assert inputs.explain().backend == "torch", "float64 on a GPU is for the torch backend"
    report = check(inputs.run(machine.backend if case.dtype is not torch.float64 else None), inputs.truth())
    record_property("used", report.used)


def test_the_automatic_choice_is_triton(gpu: Target) -> None:
    others = {case.name for case in PLAIN if case.make(gpu.device).explain().backend != "triton"}
    assert not others
