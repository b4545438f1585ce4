"""Every problem on every instruction set: right, with the same bits for any number of threads, and within its memory.

    python -m tests.sanitize.sweep [--module build/sanitize/address/_cpu.so] [--memory end] [--problems sample] [--threads 1 2 7]

A fault ends the process; the last line printed names the problem it was in.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from fused_attention import cpu_backend, cpu_pages, cpu_weights
from fused_attention.layer_ops import cpu as layer_cpu

from .guard_pages import Side, guarded
from .kernel_tables import installed, load_tables, using
from .problems import Problem, Results, all_problems, sample

LAYER_FUNCTIONS = (
    "linear",
    "linear_backward",
    "add_norm",
    "add_norm_backward",
    "bias_activation",
    "bias_activation_backward",
    "rotate",
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """The kernels use `count` threads; PyTorch's own operators keep to one, for no sanitizer sees into its pool."""
    with ExitStack() as stack:
        for module in (cpu_backend, cpu_pages, cpu_weights, layer_cpu):
            stack.enter_context(patch.object(module, "threads", lambda: count))
        yield


@contextmanager
def kernels_against_pages(side: Side) -> Iterator[None]:
    """Whatever the kernels read and write borders on unreadable memory."""
    backend = cpu_backend.CpuBackend
    attention = [(backend, "forward"), (backend, "backward"), (cpu_pages, "attend"), (cpu_weights, "attention_weights")]
    places = [*attention, *((layer_cpu, name) for name in LAYER_FUNCTIONS)]
    patches = [patch.object(place, name, guarded(getattr(place, name), side)) for place, name in places]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def same_bits(got: Results, expected: Results) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def check(problem: Problem, counts: list[int], memory: Side | None) -> None:
    with threads(counts[0]):
        expected = problem.run()
    if memory is None:
        problem.judge(expected)
    for count in counts[1:]:
        with threads(count):
            same_bits(problem.run(), expected)
    if memory is not None:
        with threads(counts[-1]), kernels_against_pages(memory):
            same_bits(problem.run(), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", type=Path, default=None, help="the compiled module; else the installed one")
    parser.add_argument("--memory", choices=["end", "beginning"], help="lay every tensor against an unreadable page")
    parser.add_argument("--problems", choices=["all", "sample"], default="all", help="sample: those of one option, on two tables each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="the first is judged, the others must have its bits")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    tables = load_tables(options.module or installed())
    count = 0
    for number, problem in enumerate(sample() if options.problems == "sample" else all_problems()):
        taken = itertools.islice(itertools.cycle(tables), number, number + 2) if options.problems == "sample" else tables
        for isa in dict.fromkeys(taken):
            print(isa, problem.name, flush=True)
            with using(tables[isa]):
                check(problem, options.threads, options.memory)
            count += 1
    print(f"{count} problems on {', '.join(tables)}: clean")


if __name__ == "__main__":
    main()
