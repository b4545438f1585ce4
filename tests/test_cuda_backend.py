"""What the cuda backend says: why it is off, and what it refuses; that it computes right is shown in tests/simt."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fused_attention import cuda_backend
from fused_attention.backend import KERNELS, choose
from fused_attention.cache import STRIDE
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
        ({"dtype": torch.float64}, "q is torch.float64, and the cuda backend computes torch.float16, torch.bfloat16 and torch.float32"),
        ({"head_dim": 257}, "head_dim is 257, head_dim_v 257, and the cuda backend computes up to 256"),
        ({"head_dim_v": 300}, "head_dim is 8, head_dim_v 300, and"),
        ({"architecture": (7, 5)}, "the GPU has compute capability 7.5, and the cuda backend needs 8.0"),
    ],
)
def test_what_it_refuses_it_refuses_with_the_numbers(facts, reason):
    assert CUDA.unsupported(problem(**facts)).startswith(reason)


def test_it_has_every_gradient():
    needs = frozenset(("q", "k", "v", "bias", "alibi_slopes", "sinks"))
    assert CUDA.unsupported(problem()._replace(gradients=needs)) is None


def test_a_grid_has_an_end():
    def refusal(seqlen: int, gradients: str = "") -> str | None:
        huge = Layout((2**16, 2**10, seqlen, 64), (0, 0, 0, 0))
        return CUDA.unsupported(problem()._replace(q=huge, k=huge, v=huge, gradients=frozenset(gradients)))

    assert refusal(2**9) is None
    shape = "q and k have 65536 x 1024 heads of {0} queries and {0} keys".format
    assert refusal(2**12) == f"{shape(2**12)}: a launch would have {129 * 2**26} blocks, and a grid has at most {2**31 - 1}"
    # What the backward launches beside is more: two blocks share a tile of keys, and one adds up four rows.
    assert refusal(2**10, "q").startswith(f"{shape(2**10)}: a launch would have {257 * 2**26} blocks")
    few, many = Layout((2**16, 2**10, 16, 64), (0, 0, 0, 0)), Layout((2**16, 2**10, 2**14, 64), (0, 0, 0, 0))
    assert f"would have {2**6 * 2 * 2**26} blocks" in str(CUDA.unsupported(problem()._replace(q=few, k=many, v=many)))  # which share keys
    assert refusal(2**30 + 1).endswith(f"computes up to {2**30} rows a head")


def test_the_gradient_of_a_bias_is_counted_by_the_places_it_has():
    """A bias that all members and heads share was once refused for the pairs of all of them."""
    many = Layout((2**9, 2**7, 2**12, 64), (0, 0, 0, 0))

    def refusal(*shape: int) -> str | None:
        bias = torch.zeros(1).expand(shape)
        return CUDA.unsupported(problem()._replace(q=many, k=many, v=many, bias=bias, gradients=frozenset(("q", "bias"))))

    assert refusal(1, 1, 2**12, 2**12) is None
    assert refusal(2**12, 2**12) is None
    assert refusal(2**9, 2**7, 1, 2**12) is None
    assert f"would have {2**16 * 2**7 * 2**8} blocks" in str(refusal(2**9, 2**7, 2**12, 2**12))


def test_what_a_call_is_shown_changes_no_part_up_to_32768_keys():
    """A cache shows its members as many keys as the longest has, in steps of 256: alone a member had once another kernel."""

    def part(keys: int, queries: int = 1) -> tuple[int, int] | None:
        few, shown = Layout((1, 1, queries, 64), (0, 0, 0, 0)), Layout((1, 1, keys, 64), (0, 0, 0, 0))
        made = problem()._replace(q=few, k=shown, v=shown)
        return cuda_backend._splits(made) if cuda_backend._is_split(made) else None

    assert {part(keys) for keys in range(STRIDE, 32768 + 1, STRIDE)} == {(256, count) for count in range(1, 129)}
    assert part(16 * STRIDE, cuda_backend.FEW_QUERIES) == (256, 16)
    assert part(32769) == (512, 65)
    assert part(2**20) == (2**13, 128)
    assert part(STRIDE - 1) is part(STRIDE, cuda_backend.FEW_QUERIES + 1) is None


@pytest.mark.parametrize(
    ("built_for", "served", "refused"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(9, 0), (12, 0)]),
        ("89", [(8, 9)], [(8, 0), (8, 6)]),
        ("80+PTX", [(8, 0), (9, 0), (10, 3), (12, 1)], []),
        ("90+PTX", [(9, 0), (12, 0)], [(8, 9)]),
        ("90a+PTX", [(9, 0)], [(9, 1), (10, 0)]),
        ("100f+PTX", [(10, 0), (10, 3)], [(11, 0), (12, 0), (9, 0)]),
        ("80,90,100,120", [(8, 6), (9, 0), (10, 3), (12, 1)], [(11, 0), (13, 0)]),
    ],
)
def test_a_gpu_that_the_module_has_no_code_for_is_refused(built_for, served, refused, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_built_for", lambda: built_for)

    def refusal(capability: tuple[int, int]) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return CUDA.unsupported(problem(architecture=None))

    assert {capability: refusal(capability) for capability in served} == dict.fromkeys(served)
    for capability in refused:
        assert CUDA.unsupported(problem(architecture=capability)) is None  # of a GPU that is not here every build is asked
        number = "{}{}".format(*capability)
        assert refusal(capability) == (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and fused_attention._cuda was built for {built_for} "
            f"(FUSED_ATTENTION_CUDA_ARCHS): install fused-attention again with FUSED_ATTENTION_CUDA_ARCHS={built_for},{number}"
        )


def test_a_module_that_is_not_there_refuses_no_gpu(monkeypatch):
    """`unavailable` tells that."""
    monkeypatch.setitem(sys.modules, "fused_attention._cuda", None)
    cuda_backend._module.cache_clear()
    assert cuda_backend._built_for.__wrapped__() == ""
    monkeypatch.setattr(cuda_backend, "_built_for", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    assert CUDA.unsupported(problem(architecture=None)) is None


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
