"""What a call costs the host before a kernel runs: `python -m fused_attention.benchmarks.host_path`, microseconds of Python and dispatch.

attention() = plan + dispatch + backend,    a Triton backend = views, tile, launch arguments, and a launch that does nothing here
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from fused_attention import attention, plans, triton_backend
from fused_attention.backend import KERNELS
from fused_attention.listeners import unheard

SHAPE = (1, 8, 16, 64)  # batch, heads, seqlen, head_dim: so short that the host is what a call waits for
CALLS, ROUNDS = 500, 15


class Step(NamedTuple):
    name: str
    microseconds: float  # median of the rounds, thread CPU time


def steps(calls: int = CALLS, rounds: int = ROUNDS) -> Iterator[Step]:
    """Each step of a forward call without gradients, then calls as a whole; in turns, so that a busy machine slows all alike."""
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    known = plans.plan(q, k, v, {"causal": True}, "torch").problem
    halves = [x.bfloat16() for x in (q, k, v)]
    half = plans.plan(*halves, {"causal": True}, "torch").problem
    functions: dict[str, Callable[[], Any]] = {
        "plan: checks and choice, new facts": lambda: (plans.forget(), plans.plan(q, k, v, {"causal": True}, None)),
        "plan: remembered": lambda: plans.plan(q, k, v, {"causal": True}, None),
        "dispatch: is the operator unheard": lambda: unheard(q, k, v),
        "backend triton, bf16, launch left out": lambda: KERNELS["triton"].forward(*halves, half),
    }
    if KERNELS["cpu"].unavailable() is None:
        functions["backend cpu, with its kernel"] = lambda: KERNELS["cpu"].forward(q, k, v, known)
        functions["attention() on cpu, whole"] = lambda: attention(q, k, v, causal=True, backend="cpu")
    functions["torch's SDPA, whole"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.no_grad(), launches_left_out():
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                function()
                start = time.thread_time()
                for _ in range(calls):
                    function()
                times[name].append((time.thread_time() - start) / calls * 1e6)
    return (Step(name, statistics.median(found)) for name, found in times.items())


@contextmanager
def launches_left_out() -> Iterator[None]:
    """Triton's host path as on an H200, up to the launch, which does nothing: no GPU is needed."""
    from fused_attention.triton_kernels import launch

    nothing = mock.patch.object(launch, "submit", _nothing)
    with nothing, mock.patch.object(triton_backend, "architecture", _hopper):
        yield


def _nothing(*_: Any) -> None:  # a mock would take longer than what is measured
    pass


def _hopper(device: torch.device) -> str:
    return "sm_90"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calls", type=int, default=CALLS, help="in a round")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    given = options.parse_args()
    torch.set_num_threads(1)
    table = Table("step", "us", title=f"a forward call, (batch, heads, seqlen, head_dim) = {SHAPE}, 1 thread")
    for step in steps(given.calls, given.rounds):
        table.add_row(step.name, f"{step.microseconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
