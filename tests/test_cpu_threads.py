"""The CPU kernels and threads: bits that depend neither on their number nor on the rest of the batch, wherever a call comes from."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.cpu_backend import CpuBackend
from fused_attention.testing import Case, Inputs

ROOT = Path(__file__).resolve().parents[1]
MISSING = CpuBackend().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Enough work for threads to be woken, lengths that end inside a block, more and fewer heads than threads.
CASES = [
    Case("plain", batch=3, heads=2, seqlen_q=131, seqlen_k=139, head_dim=24),
    Case("causal", batch=1, heads=1, seqlen_q=283, seqlen_k=283, head_dim=24, causal=True),
    Case("window", batch=1, heads=4, kv_heads=1, seqlen_q=157, seqlen_k=271, head_dim=17, head_dim_v=33, window=(100, 9)),
    Case("mask", batch=2, heads=1, seqlen_q=167, seqlen_k=263, head_dim=16, mask="b1qk", mask_block=64),
    Case("bias", batch=2, heads=2, seqlen_q=131, seqlen_k=149, head_dim=16, bias="11qk", hiding_bias=True),
    Case("bias-rows", batch=2, heads=2, seqlen_q=131, seqlen_k=149, head_dim=16, bias="b1q1"),
    Case("lengths", batch=3, heads=1, seqlen_q=127, seqlen_k=259, head_dim=20, kv_lengths=((0, 259), (3, 131), (9, 9)), causal=True),
    Case("scores", batch=2, heads=2, seqlen_q=131, seqlen_k=149, head_dim=16, alibi_slopes="bh", softcap=4.0, sinks=True),
    Case("slopes", batch=1, heads=1, seqlen_q=131, seqlen_k=280, head_dim=16, alibi_slopes="h", bias="1h1k"),
    Case("dropout", batch=1, heads=3, seqlen_q=131, seqlen_k=149, head_dim=16, dropout_p=0.2),
    Case("decode", batch=3, heads=4, kv_heads=2, seqlen_q=1, seqlen_k=4099, head_dim=64, kv_lengths=(4099, 130, 2050)),
    Case("few-queries", batch=1, heads=2, seqlen_q=5, seqlen_k=3001, head_dim=64, causal=True),
    Case("packed", heads=2, lengths_q=(131, 0, 70, 1), lengths_k=(149, 3, 260, 131), head_dim=32, causal=True),
    Case("packed-options", heads=2, kv_heads=1, lengths_q=(90, 131), head_dim=32, alibi_slopes="bh", sinks=True, dropout_p=0.1, unused=3),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case, dtype, threads):
    inputs = case.make(dtype=dtype)
    threads(1)
    expected = inputs.run("cpu")
    for count in (2, 5):
        threads(count)
        same_bits(inputs.run("cpu"), expected)


# PyTorch splits a sum with one result among its threads from 32768 numbers on.
MANY = (
    Case("rows-of-a-sink", batch=2, heads=1, seqlen_q=40000, seqlen_k=3, head_dim=8, sinks=True),
    Case("members-of-a-slope", batch=40000, heads=1, seqlen_q=2, seqlen_k=3, head_dim=8, alibi_slopes="h"),
)


@pytest.mark.parametrize("case", MANY, ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_sum_over_many_rows(case, threads):
    inputs = case.make()
    threads(1)
    expected = inputs.run("cpu")
    for count in (2, 5):
        threads(count)
        same_bits(inputs.run("cpu"), expected)


def member(inputs: Inputs, b: int) -> Inputs:
    """One member of a batch as a batch of its own."""

    def alone(option: Any) -> Any:
        batched = isinstance(option, Tensor) and option.dim() and option.shape[0] == len(inputs.q) and option.dim() != 1
        lengths = isinstance(option, Tensor) and option.dim() == 1 and not option.is_floating_point()
        return option[b : b + 1] if batched or lengths else option

    parts = {name: getattr(inputs, name)[b : b + 1] for name in ("q", "k", "v", "dout", "dlse")}
    return replace(inputs, **parts, options={name: alone(option) for name, option in inputs.options.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.lengths_q is None and case.batch > 1], ids=lambda case: case.name)
def test_a_member_alone_has_the_bits_it_has_in_a_batch(case, dtype, threads):
    inputs = case.make(dtype=dtype)
    threads(2)
    together = inputs.run("cpu")
    threads(1)
    for b in range(case.batch):
        alone = member(inputs, b).run("cpu")
        same_bits(alone, {name: together[name][b : b + 1] for name in ("out", "lse", "dq", "dk", "dv")})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_member_alone_has_the_bits_it_has_among_others(dtype, threads):
    inputs = next(case for case in CASES if case.name == "packed").make(dtype=dtype)
    threads(2)
    together = inputs.run("cpu")
    threads(1)
    starts, keys = (inputs.options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    for b in range(len(starts) - 1):
        of_q, of_k = slice(starts[b], starts[b + 1]), slice(keys[b], keys[b + 1])
        ends = {"cu_seqlens_q": [0, starts[b + 1] - starts[b]], "cu_seqlens_k": [0, keys[b + 1] - keys[b]]}
        tensors = {name: getattr(inputs, name)[rows] for name, rows in (("q", of_q), ("k", of_k), ("v", of_k), ("dout", of_q))}
        options = {name: torch.tensor(values, dtype=torch.int32) for name, values in ends.items()}
        alone = inputs.changed(**tensors, dlse=inputs.dlse[:, of_q], options=options).run("cpu")
        parts = {"out": together["out"][of_q], "lse": together["lse"][:, of_q], "dq": together["dq"][of_q]}
        same_bits(alone, parts | {"dk": together["dk"][of_k], "dv": together["dv"][of_k]})


def test_many_python_threads_at_once(threads):
    """Each with a pool and arenas of its own, on problems of different sizes."""
    threads(2)
    problems = [case.make() for case in CASES[:8]]
    expected = [inputs.run("cpu") for inputs in problems]
    failures: list[Exception] = []
    start = threading.Barrier(len(problems))

    def work(first: int) -> None:
        try:
            torch.set_num_threads(1 + first % 3)
            start.wait()
            for step in range(len(problems)):
                which = (first + step) % len(problems)
                same_bits(problems[which].run("cpu"), expected[which])
        except Exception as failure:  # noqa: BLE001 (reported below, by the thread that pytest watches)
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


REGION = """
import ctypes, os, sys, torch
sys.path[:0] = ["."]
from tests.test_cpu_threads import CASES, same_bits
torch.set_num_threads(2)
inputs = CASES[1].make()
expected = inputs.run("cpu")
with open("/proc/self/maps") as maps:
    library = ctypes.CDLL({line.split()[-1] for line in maps if "libgomp" in line}.pop())
seen = []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def region(_):
    before = set(os.listdir("/proc/self/task"))
    results = inputs.run("cpu")
    seen.append((library.omp_in_parallel(), set(os.listdir("/proc/self/task")) - before, results))

library.omp_set_max_active_levels(2)  # or OpenMP itself would forbid what is looked for
library.GOMP_parallel(region, None, ctypes.c_uint(2), ctypes.c_uint(0))
assert [inside for inside, _, _ in seen] == [1, 1], "that was no parallel region of two threads"
for _, started, results in seen:
    assert not started, f"a call inside the region started threads: {started}"
    same_bits(results, expected)
"""


def brings_gnu_openmp() -> bool:
    try:
        with open("/proc/self/maps") as maps:
            return any("libgomp" in line for line in maps)
    except OSError:
        return False


@pytest.mark.skipif(not brings_gnu_openmp(), reason="PyTorch's OpenMP is not GNU's here, and no other lets Python open a parallel region")
def test_inside_another_parallel_region():
    """Every thread of a region computes for itself: two pools inside one another would be threads squared.

    In a process of its own, where no thread of another test begins meanwhile.
    """
    run = subprocess.run([sys.executable, "-c", REGION], cwd=ROOT, timeout=100, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


FORK = """
import os, sys, torch
sys.path[:0] = ["."]
from tests.test_cpu_threads import CASES, layer, same_bits
torch.set_num_threads(2)
torch.autograd.set_multithreading_enabled(False)
problems = [(lambda inputs=case.make(): inputs.run("cpu", backward=False)) for case in CASES if case.name in sys.argv[1:]] + [layer]
before = [run() for run in problems]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # what PyTorch's own operators need; the kernels must see for themselves
    torch.get_num_threads = lambda: 2
    for run, expected in zip(problems, before):
        same_bits(run(), expected)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def layer() -> dict[str, Tensor]:
    from fused_attention.layer_ops import projection

    x = torch.arange(300.0 * 130).sin().view(300, 130)
    return {"out": projection.linear_op(x, x, None, None, "gelu", False)[0]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_forked_child():
    """It inherits OpenMP's pool without the pool's threads, and would wait for them for ever."""
    names = ["plain", "window", "decode", "packed"]
    run = subprocess.run([sys.executable, "-c", FORK, *names], cwd=ROOT, timeout=100, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
