"""The CPU kernels and memory: every access within its tensor, no allocation once warm, denormal numbers left alone."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_attention import attention
from fused_attention.cpu_backend import CpuBackend
from fused_attention.testing import CASES

from .sanitize.kernel_tables import using
from .sanitize.problems import attention as attention_problem
from .sanitize.problems import layer

ROOT = Path(__file__).resolve().parents[1]
MISSING = CpuBackend().unavailable()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
linux = pytest.mark.skipif(sys.platform != "linux", reason="uses what Linux says of a process's memory")

OUTSIDE = """
import sys, torch
from fused_attention.cpu_backend import CpuBackend
from fused_attention.problem import Layout, Problem
from tests.sanitize.guard_pages import guarded
q = torch.ones(1, 1, 40, 16)
layout = Layout.of(q)
rows = int(sys.argv[2])
k = layout._replace(shape=(1, 1, 40 + rows, 16))
problem = Problem(q=layout, k=k, v=k, dtype=q.dtype, device=q.device, scale=1.0)
out, lse = guarded(CpuBackend().forward, sys.argv[1])(q, q, q, problem)
"""

# Counts what is allocated while it is told to; g++'s operator new ends in malloc too.
COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
static int counting;
int allocations;
void count(int on) { counting = on; if (on) allocations = 0; }
void* malloc(size_t size) { allocations += counting; return __libc_malloc(size); }
void* calloc(size_t n, size_t size) { allocations += counting; return __libc_calloc(n, size); }
void* realloc(void* p, size_t size) { allocations += counting; return __libc_realloc(p, size); }
void* aligned_alloc(size_t alignment, size_t size) { allocations += counting; return __libc_memalign(alignment, size); }
"""
ALLOCATIONS = """
import ctypes, torch
from fused_attention import _cpu
from fused_attention.cpu_arguments import Arguments
from fused_attention.cpu_backend import CpuBackend
from fused_attention.problem import Layout, Problem
from tests.sanitize.kernel_tables import set_module
counter = ctypes.CDLL(None)
allocated = ctypes.c_int.in_dll(counter, "allocations")

class Counted:
    def __init__(self, function):
        self.function = function
    def __call__(self, *arguments):
        counter.count(1)
        self.function(*arguments)
        counter.count(0)
        counts.append(allocated.value)

class Module:
    forward, backward = Counted(_cpu.forward), Counted(_cpu.backward)

set_module(Module)
backend = CpuBackend()
for threads, dtype in ((1, torch.float32), (1, torch.float64), (2, torch.bfloat16), (2, torch.float32)):
    torch.set_num_threads(threads)
    q, k = torch.randn(2, 2, 150, 24, dtype=dtype), torch.randn(2, 2, 300, 24, dtype=dtype)
    bias = torch.randn(150, 300, dtype=dtype)
    problem = Problem(q=Layout.of(q), k=Layout.of(k), v=Layout.of(k), dtype=dtype, device=q.device, scale=0.2, bias=bias)
    problem = problem._replace(gradients=frozenset(("q", "k", "v", "bias")))
    history = []
    for repeat in range(4):
        counts = []
        out, lse = backend.forward(q, k, k, problem)
        backend.backward(out, None, q, k, k, out, lse, problem)
        history.append(counts)
    print(threads, dtype, history)
    if len(counts) != 2 or any(counts) or threads == 1 and not all(history[0]):
        raise SystemExit(1)

# Decoding, where each range of keys of each head keeps its result till all are there.
q, k = torch.randn(8, 32, 1, 128), torch.randn(1, 1, 8192, 128).expand(8, 32, 8192, 128)
problem = Problem(q=Layout.of(q), k=Layout.of(k), v=Layout.of(k), dtype=q.dtype, device=q.device, scale=0.1)
counts = []
for repeat in range(4):
    backend.forward(q, k, k, problem)
print("decoding", counts)
if counts[-1] or not counts[0]:
    raise SystemExit(1)

# out alone, of so many rows that their lse in float32 is kept and in float64 would not be.
torch.set_num_threads(1)
q, k = torch.randn(1, 1, 3 << 19, 8), torch.randn(1, 1, 1, 8)
problem = Problem(q=Layout.of(q), k=Layout.of(k), v=Layout.of(k), dtype=q.dtype, device=q.device, scale=0.1)
out = torch.empty_like(q)
call = Arguments(q, k, k, out, q.new_empty(q.shape[:3]), problem)
counts, run = [], Counted(_cpu.prepare(call.tensors, call.sizes, call.visible, call.options))
for repeat in range(3):
    run(q.data_ptr(), k.data_ptr(), k.data_ptr(), out.data_ptr(), 0, 1)
print("out alone", counts)
if counts[-1] or not counts[0]:
    raise SystemExit(1)
"""

DENORMAL_AFTER_LOADING = """
import sys
tiny, half = float.fromhex("0x1p-1060"), 0.5
before = tiny * half
sys.path[:0] = sys.argv[1:]
import _cpu
_cpu.isa()
raise SystemExit(0 if tiny * half == before != 0 else 1)
"""


def python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False)


@linux
@pytest.mark.parametrize("side", ["end", "beginning"])
def test_every_access_lies_within_its_tensor(side):
    """Every table and kind of problem, each tensor against an unreadable page; a fault names the problem it was in."""
    command = [sys.executable, "-m", "tests.sanitize.sweep", "--memory", side, "--problems", "sample"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-300:] + run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].endswith("clean")


def test_problems_run_on_the_table_in_use():
    """The backend remembers the module it once imported, and a sweep over tables would go over one."""
    nothing, q = ModuleType("no kernels"), torch.randn(1, 2, 5, 8)
    for run in (attention_problem(CASES[0]).run, next(layer()).run, lambda: attention(q, q, q, backend="cpu")):
        run()  # what is remembered of it then is of the installed one
        with using(nothing), pytest.raises(AttributeError, match="no kernels"):
            run()
        run()


@linux
def test_an_access_outside_would_be_noticed():
    assert python(OUTSIDE, "end", "1").returncode == -signal.SIGSEGV
    assert python(OUTSIDE, "beginning", "1000").returncode == -signal.SIGSEGV


@linux
def test_a_warm_call_allocates_nothing(tmp_path):
    """Each thread keeps its arena from call to call; that the first call fills it shows that the counter counts."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, and the counter of allocations is C")
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", str(source), "-o", str(library)], check=True)
    run = python(ALLOCATIONS, LD_PRELOAD=str(library))
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_loading_leaves_denormals_alone():
    """The crtfastmath of -ffast-math would flush them in the whole process."""
    from fused_attention import _cpu

    assert python(DENORMAL_AFTER_LOADING, str(Path(_cpu.__file__).parent)).returncode == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_leave_denormals_alone(threads):
    """Before and after, in this thread and, as the pool's threads share the elements, in those."""
    tiny = torch.full((2**17,), 2.0**-140)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert (tiny * 0.5 == 2.0**-141).all()
        q = torch.randn(1, 4, 300, 16, requires_grad=True)
        attention(q, q, q, backend="cpu").sum().backward()
        assert (tiny * 0.5 == 2.0**-141).all()
    finally:
        torch.set_num_threads(before)
    assert ctypes.c_double(float.fromhex("0x1p-1060") * 0.5).value == float.fromhex("0x1p-1061")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormal_values_come_through(dtype):
    """Of one visible key the value itself is the result, however small."""
    q, k = torch.randn(2, 1, 2, 20, 16, dtype=dtype).unbind()
    v = torch.full_like(k, 3 * torch.finfo(dtype).smallest_normal / 1024)
    assert torch.equal(attention(q, k, v, window=(0, 0), backend="cpu"), v)
