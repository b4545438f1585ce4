"""The target of the GPU tests, and their part in a run of many processes that share a list: a deadline, and a record of what happened.

GPU_RUN_UNTIL=<seconds since 1970>  GPU_RUN_RECORD=<file>        set by run.py; neither is needed to run a test by hand
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_attention.benchmarks.record import Record

from . import cuda_module
from .target import Target, target

LEFT_OUT = "the time of the step was over"
DEVICE_LOST = 3  # exit status: the process can compute nothing any more, a new one may go on
MESSAGE_LENGTH = 600
# What the CUDA kernels leave to others; anything else they refuse is a failure.
BEYOND = re.compile(
    r"backend='cuda' can't run this call: (q is torch.float64|head_dim is \d+, head_dim_v \d+, and the cuda backend computes up to)"
)

record = Record(Path(os.environ["GPU_RUN_RECORD"]) if "GPU_RUN_RECORD" in os.environ else None)


@pytest.fixture(scope="session")
def machine() -> Target:
    """Where to run; without a GPU, or a compiler for the kernels to judge, the test is skipped; where they do not compile it fails."""
    found = target()
    if found is None:
        pytest.skip("torch sees no GPU here; make gpu runs this where it does")
    if found.backend == "cuda" and not found.rehearsed:
        reason = cuda_module.provide(found.device)
        if reason is not None:
            pytest.skip(reason)
    return found


@pytest.fixture
def gpu(machine: Target) -> Target:
    """The same, for tests of what only a GPU has: streams, graphs, its memory."""
    if machine.rehearsed:
        pytest.skip("a rehearsal has no streams, graphs or large memory")
    return machine


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True, which stands for "done", where another process has claimed the test."""
    return None if record.claim(item.nodeid) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except NotImplementedError as refusal:
        if BEYOND.match(str(refusal)):
            pytest.skip(str(refusal))
        raise


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("GPU_RUN_UNTIL", "inf")):
        pytest.skip(LEFT_OUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    # One line a test: of its call, or of whatever kept it from being called.
    if report.when == "call" or (report.when == "setup" and not report.passed):
        message = _message(report)
        outcome = "left out" if report.skipped and LEFT_OUT in message else report.outcome
        record.ended(item.nodeid, outcome, message=message, seconds=call.duration, facts=dict(item.user_properties))
        if report.failed and not _device_works():
            os._exit(DEVICE_LOST)  # every test after an illegal access would fail with it
    return report


def _message(report: Any) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(report.longrepr) if crash is None else str(crash.message))[:MESSAGE_LENGTH]


def _device_works() -> bool:
    if target() is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
