"""How a speed is measured: contenders in turns in one process, each timed call right after an untimed one of the same function.

one thread    the thread's own CPU time, so that neighbours on the machine matter little
more threads  wall time, which they do disturb
reported      median, quartiles and minimum of at least five rounds
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h
LARGEST_INT = 2**31 - 1
GEMM_SIZE, GEMM_ROUNDS = 1024, 8


@dataclass(frozen=True)
class Protocol:
    """How long and by which clock."""

    threads: int = 1
    least_rounds: int = 5
    most_rounds: int = 25
    budget: float = 1.0  # seconds a contender may take beyond the least rounds
    device: str = "cpu"

    @property
    def clock_name(self) -> str:
        return "thread CPU time" if self.threads == 1 else "wall time"

    def now(self) -> float:
        return time.thread_time() if self.threads == 1 else time.perf_counter()

    def time_in_turns(self, functions: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Timing], dict[str, Any]]:
        return time_in_turns(functions, self)

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        return peak_extra_bytes(function)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    rounds: int

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.upper_quartile - self.lower_quartile

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(median, lower, upper, min(seconds), len(seconds))


def time_in_turns(functions: Mapping[str, Callable[[], Any]], protocol: Protocol) -> tuple[dict[str, Timing], dict[str, Any]]:
    """The timing of each function, and what its last timed call returned."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    end = time.perf_counter() + protocol.budget * len(functions)
    for rounds in range(protocol.most_rounds):
        if rounds >= protocol.least_rounds and time.perf_counter() > end:
            break
        for name, function in functions.items():
            results.pop(name, None)  # or the next call could not have its memory back
            function()
            start = protocol.now()
            result = function()
            seconds[name].append(protocol.now() - start)
            results[name] = result
    return {name: Timing.of(values) for name, values in seconds.items()}, results


def keep_freed_memory() -> str:
    """Makes glibc reuse freed memory, for every contender alike; says what was done.

    By default glibc maps each large block afresh, and the page faults on S x S temporaries slow the naive form about threefold.
    """
    if not sys.platform.startswith("linux"):
        return "the system's default (no mallopt here)"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT)):
        return "the system's default (mallopt is missing or refused)"
    return "mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)"


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """The most bytes torch's allocator held beyond what was there before one call, results included."""
    function()
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    del result
    held = most = 0
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler's C++ half announces each start and stop there, in the middle of the progress bar.
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def best_gemm(dtype: torch.dtype, protocol: Protocol) -> float:
    """FLOP/s of the fastest matrix product at hand, in this type or in the fp32 that any narrow type converts to.

    torch's matmul (MKL, say) competes with oneDNN's product, which torch.nn.Linear does not always take.
    """
    candidates: list[Callable[[], Any]] = []
    for each in dict.fromkeys((dtype, torch.float32)):
        candidates += _products(torch.randn(GEMM_SIZE, GEMM_SIZE).to(each))
    return 2.0 * GEMM_SIZE**3 / min(_fastest(candidate, protocol) for candidate in candidates)


def _products(matrix: torch.Tensor) -> list[Callable[[], Any]]:
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    by_onednn: list[Callable[[], Any]] = [] if linear is None else [lambda: linear(matrix, matrix, None, "none", [], "")]
    return [lambda: matrix @ matrix, *by_onednn]


def _fastest(function: Callable[[], Any], protocol: Protocol) -> float:
    """The least seconds of a few calls; infinite where the function refuses, as oneDNN's product does some types on some machines."""
    seconds = []
    for _ in range(GEMM_ROUNDS):
        start = protocol.now()
        try:
            function()
        except RuntimeError:
            return float("inf")
        seconds.append(protocol.now() - start)
    return min(seconds)
