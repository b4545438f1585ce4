"""The linear-time truth: at small sizes the values of the float64 oracle, no bound below its own; and it sees what it is there to see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention_with_lse
from fused_attention.testing import oracle, tier1
from fused_attention.testing.separable import Separable, separable

SHAPES: dict[str, dict[str, Any]] = {
    "full": {"seqlen_q": 17, "seqlen_k": 23},
    "causal": {"seqlen_q": 31, "seqlen_k": 31, "causal": True},
    "causal-more-queries": {"seqlen_q": 29, "seqlen_k": 11, "causal": True},
    "window": {"seqlen_q": 37, "seqlen_k": 41, "window": (5, 3)},
    "window-left": {"seqlen_q": 37, "seqlen_k": 41, "window": (7, None)},
    "window-right": {"seqlen_q": 19, "seqlen_k": 41, "window": (None, 2)},
    "causal-window": {"seqlen_q": 33, "seqlen_k": 33, "window": (4, None), "causal": True},
    "offset": {"seqlen_q": 13, "seqlen_k": 19, "causal": True, "offset": 2},
    "offset-negative": {"seqlen_q": 13, "seqlen_k": 19, "window": (3, 2), "offset": -6},
    "far-shift": {"seqlen_q": 17, "seqlen_k": 23, "reach": 4096.0},
}
FACTS: dict[str, Any] = {"batch": 2, "heads": 3, "head_dim": 16, "head_dim_v": 5}


def run(problem: Separable, **changed: Any) -> dict[str, Tensor]:
    """What the torch backend computes; changed: options other than the problem's."""
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    result = attention_with_lse(*leaves, **(problem.options | changed), backend="torch")
    gradients = torch.autograd.grad(result, leaves, (problem.dout, problem.dlse))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*result, *gradients), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_oracle_in_linear_time(name: str, dtype: torch.dtype) -> None:
    problem = separable(**SHAPES[name], **FACTS, dtype=dtype)
    truth = oracle(problem.q, problem.k, problem.v, dout=problem.dout, dlse=problem.dlse, **problem.options)
    values, bounds = problem.truth()
    allowed = tier1(truth)
    assert values.keys() == bounds.keys() == truth.values.keys()
    for tensor, expected in truth.values.items():
        torch.testing.assert_close(values[tensor], expected, rtol=1e-12, atol=1e-12, msg=lambda text, tensor=tensor: f"{tensor}: {text}")
        assert (bounds[tensor] >= 0.999 * allowed[tensor]).all(), f"the bound of {tensor} is below the oracle's"
        assert bounds[tensor].mean() <= 8 * allowed[tensor].mean(), f"the bound of {tensor} would let faults pass"


@pytest.mark.parametrize("name", SHAPES)
def test_a_right_result_passes(name: str) -> None:
    problem = separable(**SHAPES[name], **FACTS, dtype=torch.float32)
    assert 0.0 < problem.check(run(problem)).used <= 1.0


def test_a_long_row_passes() -> None:
    problem = separable(1031, 1031, causal=True, head_dim=16, dtype=torch.bfloat16)
    assert problem.check(run(problem)).used <= 1.0


FAULTS: dict[str, dict[str, Any]] = {
    "not causal": {"causal": False},
    "window one short": {"window": (399, None)},
    "offset one off": {"offset": 1},
    "scale forgotten": {"scale": 1.0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_option_fails(fault: str) -> None:
    problem = separable(509, 509, window=(400, None), causal=True, head_dim=16, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="times its bound"):
        problem.check(run(problem, **FAULTS[fault]))


@pytest.mark.parametrize("tensor", ["out", "lse", "dq", "dk", "dv"])
def test_one_wrong_row_fails(tensor: str) -> None:
    problem = separable(257, 257, causal=True, head_dim=16, dtype=torch.float32)
    results = {name: value.detach().clone() for name, value in run(problem).items()}
    results[tensor][0, 0, 200] *= 1.01
    with pytest.raises(AssertionError, match=f"^{tensor} uses .* most at .0, 0, 200"):
        problem.check(results)


def test_scores_have_no_rounding() -> None:
    """Or the bound would have to count it."""
    problem = separable(64, 64, reach=4096.0, dtype=torch.bfloat16)
    exact = separable(64, 64, reach=4096.0, dtype=torch.float64)
    assert torch.equal(problem.q.double(), exact.q)
    assert torch.equal(problem.k.double(), exact.k)


def test_what_is_not_separable_is_refused() -> None:
    with pytest.raises(ValueError, match="got softcap, expected only causal, window and offset"):
        separable(5, 5, softcap=2.0)
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected one of torch.bfloat16"):
        separable(5, 5, dtype=torch.float16)


def test_a_row_that_sees_nothing_is_zero() -> None:
    problem = separable(29, 11, causal=True, dtype=torch.float64)
    values, bounds = problem.truth()
    blind = slice(0, 18)
    assert (values["lse"][..., blind] == -torch.inf).all()
    assert all((values[name][..., blind, :] == 0.0).all() and (bounds[name][..., blind, :] == 0.0).all() for name in ("out", "dq"))
    with pytest.raises(AssertionError, match=r"^out"):
        problem.check(run(replace(problem, options={"causal": True, "offset": 0})))
