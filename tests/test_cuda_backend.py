"""What the cuda backend says: why it is off, and what it refuses; that it computes right is shown in tests/simt."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fused_attention import cuda_backend
from fused_attention.backend import KERNELS, choose
from fused_attention.problem import Layout, Problem
from fused_attention.testing import Case
from fused_attention.validation import check

CUDA = KERNELS["cuda"]
GPU = torch.device("cuda", 0)
UPDATE = (
    "the NVIDIA driver serves CUDA 12.4, and fused_attention._cuda was built with CUDA 13.0: update the driver, "
    "or install fused-attention again with an nvcc of CUDA 12"
)


def problem(*, dtype=torch.bfloat16, architecture=(9, 0), **facts) -> Problem:
    """A problem of tensors that lie on a GPU, as far as dispatch can tell."""
    inputs = Case("a call", **facts).make(dtype=dtype)
    return check(inputs.q, inputs.k, inputs.v, **inputs.options)._replace(device=GPU, architecture=architecture)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "q is torch.float32, and the cuda backend computes torch.float16 and torch.bfloat16"),
        ({"head_dim": 257}, "head_dim is 257, head_dim_v 257, and the cuda backend computes up to 256"),
        ({"head_dim_v": 300}, "head_dim is 8, head_dim_v 300, and"),
        ({"architecture": (7, 5)}, "the GPU has compute capability 7.5, and the cuda backend needs 8.0"),
    ],
)
def test_what_it_refuses_it_refuses_with_the_numbers(facts, reason):
    assert CUDA.unsupported(problem(**facts)).startswith(reason)


def test_a_call_that_needs_gradients_it_lacks_is_refused_before_it_runs():
    needs = problem()._replace(gradients=frozenset(("q", "sinks", "bias")))
    reason = "gradients of bias, sinks are needed, and the cuda backend computes those of q, k and v alone so far"
    assert CUDA.unsupported(needs) == reason
    assert CUDA.unsupported(problem()._replace(gradients=frozenset(("q", "k", "v")))) is None


def test_a_grid_has_an_end():
    huge = Layout((2**16, 2**10, 2**10, 64), (0, 0, 0, 0))
    refusal = CUDA.unsupported(problem()._replace(q=huge, k=huge, v=huge))
    assert refusal is None
    huge = Layout((2**16, 2**10, 2**12, 64), (0, 0, 0, 0))
    assert CUDA.unsupported(problem()._replace(q=huge, k=huge, v=huge)).startswith("q and k have 65536 x 1024 heads of 4096 queries")


def test_it_is_taken_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(type(CUDA), "unavailable", lambda self: None)
    monkeypatch.setattr(type(KERNELS["triton"]), "unavailable", lambda self: "it is off")
    assert choose(problem(), None) == "torch"
    assert choose(problem(), "cuda") == "cuda"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((1, "", 13000, 13000), None),
        ((0, "cudaErrorInsufficientDriver: too old", 0, 13000), "this machine has no NVIDIA driver"),
        (
            (0, "cudaErrorInsufficientDriver: too old", 12040, 13000),
            UPDATE,
        ),
        ((0, "cudaErrorNoDevice: none", 13000, 13000), "the NVIDIA driver finds no GPU (cudaErrorNoDevice: none)"),
    ],
)
def test_why_it_is_off(monkeypatch, answer, reason):
    monkeypatch.setattr(cuda_backend, "_module", lambda: SimpleNamespace(available=lambda: answer))
    assert cuda_backend._unavailable.__wrapped__() == reason


def test_without_the_module_it_says_what_the_build_said(monkeypatch):
    cuda_backend._module.cache_clear()
    monkeypatch.setitem(sys.modules, "fused_attention._cuda", None)
    monkeypatch.setattr(cuda_backend, "build_reason", lambda part: f"nvcc was not found for {part}")
    assert cuda_backend._unavailable.__wrapped__() == "the compiled module fused_attention._cuda is missing: nvcc was not found for cuda"
