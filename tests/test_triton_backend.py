"""The Triton backend as a seat in the choice: what it takes, what it refuses and why, and that its host code asks the device nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fused_attention import backends
from fused_attention.backend import KERNELS, choose
from fused_attention.problem import Layout, Problem
from fused_attention.testing import Case
from fused_attention.triton_backend import _unavailable
from fused_attention.validation import check

TRITON = KERNELS["triton"]
GPU = torch.device("cuda", 0)


def problem(*, dtype=torch.bfloat16, architecture=(9, 0), **facts) -> Problem:
    """A problem of tensors that lie on a GPU, as far as dispatch can tell."""
    inputs = Case("a call", **facts).make(dtype=dtype)
    return check(inputs.q, inputs.k, inputs.v, **inputs.options)._replace(device=GPU, architecture=architecture)


def test_cuda_tensors_pick_it_first(monkeypatch):
    monkeypatch.setattr(type(TRITON), "unavailable", lambda self: None)
    assert choose(problem(), None) == "triton"
    assert choose(problem(dtype=torch.float64), None) == "torch"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float64}, "q is torch.float64, and the triton backend computes torch.float16, torch.bfloat16 and torch.float32"),
        ({"head_dim": 513}, "head_dim is 513, head_dim_v 513, and the triton backend computes up to 512"),
        ({"head_dim_v": 600}, "head_dim is 8, head_dim_v 600, and"),
        ({"architecture": (7, 5)}, "the GPU has compute capability 7.5, and the triton backend needs 8.0"),
    ],
)
def test_what_it_refuses_it_refuses_with_the_numbers(facts, reason):
    assert TRITON.unsupported(problem(**facts)).startswith(reason)


def test_a_grid_has_an_end():
    huge = Layout((2**16, 2**10, 2**10, 64), (0, 0, 0, 0))
    refusal = TRITON.unsupported(problem()._replace(q=huge, k=huge, v=huge))
    assert refusal.startswith(
        "q and k have 65536 x 1024 heads of 1024 queries and 1024 keys: more tiles of 16 than the 2147483647 programs"
    )


def test_cpu_tensors_never_come_to_it_unasked():
    inputs = Case("a call").make()
    assert inputs.explain().backend != "triton"
    if backends()["triton"] is not None:
        assert TRITON.unsupported(check(inputs.q, inputs.k, inputs.v)) == (
            "q is on cpu, and the triton backend computes on CUDA and ROCm tensors"
        )


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _unavailable.cache_clear()
    try:
        assert TRITON.unavailable() == "triton is not installed: pip install 'fused-attention[triton]'"
    finally:
        _unavailable.cache_clear()


def test_importing_the_package_loads_no_kernel_and_opens_no_device():
    """Kernels need triton, which not every machine has, and an import that starts CUDA breaks forked workers."""
    code = "import sys, torch, fused_attention; print('fused_attention.triton_kernels' in sys.modules, torch.cuda.is_initialized())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout
    assert printed.split() == ["False", "False"]
