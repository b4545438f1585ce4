"""The steps of `make gpu`: what runs, in how many processes, for how long at most; under nine minutes in all.

first: the machine   ->   together: tests, and the compilers' caches for the benchmark   ->   alone: the benchmark
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["first", "together", "alone"]
PHASES: tuple[Phase, ...] = ("first", "together", "alone")
TOTAL_SECONDS = 9 * 60
REPORT_SECONDS = 20  # kept back for the report
TOGETHER_SECONDS = 260
BENCHMARK = "benchmark"
PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "filterwarnings=")  # a new torch's warning loses no result


@dataclass(frozen=True)
class Step:
    """One command of Python in some processes, which share its list and say what they did in their records."""

    name: str
    title: str
    command: tuple[str, ...]
    seconds: int
    processes: int = 1
    phase: Phase = "together"
    patience: float = 120.0  # seconds without a line in a record: the first import, the build and the slowest test fit
    backend: str = "triton"  # whose kernels the tests judge


def _tests(name: str, title: str, processes: int = 1) -> Step:
    return Step(name, title, (*PYTEST, f"tests/gpu/test_gpu_{name}.py"), TOGETHER_SECONDS, processes)


def _of_cuda(step: Step, processes: int) -> Step:
    """The same tests of the CUDA kernels, which the first process compiles."""
    return replace(step, name=f"cuda-{step.name}", title=f"cuda: {step.title}", processes=processes, backend="cuda")


MACHINE = Step("machine", "what the machine is", ("-m", "fused_attention.benchmarks.device_environment"), 50, phase="first")
TESTS = (
    replace(_tests("sanitizer", "compute-sanitizer", 3), patience=TOGETHER_SECONDS),
    _tests("sizes", "beyond int32, a million tokens"),
    _tests("streams", "streams, graphs, no waiting"),
    _tests("caches", "caches, pages, decoding in a graph", 2),
    _tests("repeats", "the same bits again", 2),
    _tests("margins", "NaN around every buffer", 2),
    _tests("tiles", "real tiles against float64", 3),
    _tests("matrix", "every case against float64", 12),
)
OF_CUDA_TOO = {"sanitizer": 3, "streams": 1, "caches": 1, "repeats": 1, "margins": 1, "tiles": 2, "matrix": 4}  # in so many processes
# Processes begin in this order, as cores become free; the matrix takes whatever the others leave.
STEPS = (
    MACHINE,
    Step("compile", "kernels of the benchmark", ("-m", "fused_attention.benchmarks.device", "--compile-only"), TOGETHER_SECONDS, 3),
    *TESTS[:-1],
    replace(_tests("cuda", "cuda: beside triton and torch"), backend="cuda"),
    *(_of_cuda(step, OF_CUDA_TOO[step.name]) for step in TESTS if step.name in OF_CUDA_TOO),
    TESTS[-1],
    Step(BENCHMARK, "speed against every rival", ("-m", "fused_attention.benchmarks.device"), 180, phase="alone"),
)
EXPERIMENTS = "experiments"
# What runs only when it is named.
OPTIONAL = (
    Step(EXPERIMENTS, "kernels that may replace ours", ("-m", "fused_attention.benchmarks.experiments"), 420, phase="alone", patience=300),
)


def chosen(names: list[str] | None) -> tuple[Step, ...]:
    """The steps to run, the machine's always among them; all without names."""
    named = tuple(step for step in OPTIONAL if step.name in (names or ()))
    return tuple(step for step in STEPS if names is None or step.name in names or step is MACHINE) + named


def longest_seconds(steps: tuple[Step, ...]) -> int:
    """What the steps may take at most: phases follow each other, steps of one run side by side."""
    return sum(max((step.seconds for step in steps if step.phase == phase), default=0) for phase in PHASES)


def rehearsed(step: Step) -> Step:
    """The same step with as little as shows that it works, on a machine without a GPU."""
    items = ("--rehearse", "--items", "gpt2-1k bf16", "decode-8k bf16")
    cells = ("--rehearse", "--out", "build/gpu", "--cells", "d64 causal 4k")
    small = {"compile": items, BENCHMARK: items, EXPERIMENTS: cells}.get(step.name, ())
    return replace(step, command=(*step.command, *small), processes=min(step.processes, 2))
