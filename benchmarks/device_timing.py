"""How a speed is measured on a GPU: the device's own clock around one call, contenders in turns, nothing of theirs in the L2 cache.

write a buffer larger than the cache  ->  hold the device until the host has queued the call  ->  event  ->  the call  ->  event
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .timing import Protocol, Timing

FLUSHED_BYTES = 2**28  # several times the largest L2
HELD_CYCLES = 2_000_000  # about a millisecond: longer than any contender's host code, so that no gap between its kernels is timed
GEMM_SIZE = 8192
HOST_CALLS, HOST_BATCHES, HOST_WARM_UPS = 100, 7, 20


@dataclass(frozen=True)
class DeviceProtocol(Protocol):
    """Kernel time in the process's current stream; the fields of Protocol keep their meaning."""

    least_rounds: int = 10
    most_rounds: int = 40
    budget: float = 0.15
    device: str = "cuda"

    @property
    def clock_name(self) -> str:
        return "device events"

    def now(self) -> float:
        return time.perf_counter()

    def time_in_turns(self, functions: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Timing], dict[str, Any]]:
        """The timing of each function, and what its last timed call returned."""
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in functions}
        results: dict[str, Any] = {}
        scratch = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.device)
        for function in functions.values():
            function()
        end = time.perf_counter() + self.budget * len(functions)
        for rounds in range(self.most_rounds):
            if rounds >= self.least_rounds and time.perf_counter() > end:
                break
            for name, function in functions.items():
                results.pop(name, None)  # or the next call could not have its memory back
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                scratch.zero_()
                torch.cuda._sleep(HELD_CYCLES)
                before.record()
                results[name] = function()
                after.record()
                events[name].append((before, after))
            torch.cuda.synchronize()
        timings = {name: Timing.of([before.elapsed_time(after) / 1e3 for before, after in pairs]) for name, pairs in events.items()}
        return timings, results

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        """The most bytes torch's allocator held beyond what was there before one call, results included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return int(torch.cuda.max_memory_allocated()) - int(held)


def best_gemm(dtype: torch.dtype, protocol: DeviceProtocol) -> float:
    """FLOP/s of a large matrix product of random numbers through torch."""
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE, device=protocol.device).to(dtype)
    timings, _ = protocol.time_in_turns({"product": lambda: matrix @ matrix})
    return 2.0 * GEMM_SIZE**3 / timings["product"].median


def copy_bandwidth(protocol: DeviceProtocol) -> float:
    """Bytes a second of a large copy, read and written ones together."""
    source = torch.empty(2**31, dtype=torch.uint8, device=protocol.device)
    target = torch.empty_like(source)
    timings, _ = protocol.time_in_turns({"copy": lambda: target.copy_(source)})
    return 2.0 * source.numel() / timings["copy"].median


def host_seconds(function: Callable[[], Any]) -> float:
    """What a call costs the host before the device works: the median of a few batches of calls that wait for nothing."""
    for _ in range(HOST_WARM_UPS):
        function()
    seconds = []
    for _ in range(HOST_BATCHES):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            function()
        seconds.append((time.perf_counter() - start) / HOST_CALLS)
    return statistics.median(seconds)
