"""A call of attention from its arguments to its results: autocast, the plan, a seed for dropout, and whoever computes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autocast, dropout, ops, reference
from .backend import REFERENCE
from .plans import Plan, plan
from .problem import AttentionOutput, Problem


def call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], backend: str | None) -> AttentionOutput:
    """out and lse; options: those of `attention` that were given, or of `attention_varlen` with packed=True."""
    q, k, v = autocast.cast(q, k, v)
    problem, name, tensors = _plan(q, k, v, options, backend)
    return _by_definition(q, k, v, problem) if name == REFERENCE else ops.run(q, k, v, problem, name, tensors)


def call_for_out(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], backend: str | None) -> Tensor:
    """out alone, which can be less work."""
    q, k, v = autocast.cast(q, k, v)
    problem, name, tensors = _plan(q, k, v, options, backend)
    return _by_definition(q, k, v, problem).out if name == REFERENCE else ops.run_for_out(q, k, v, problem, name, tensors)


def _plan(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], backend: str | None) -> Plan:
    """With a new seed where weights are dropped and none was given."""
    made = plan(q, k, v, options, backend)
    if made.problem.dropout_p == 0 or made.problem.dropout_seed is not None:
        return made
    return made._replace(problem=made.problem._replace(dropout_seed=dropout.new_seed(q.device)))


def _by_definition(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
    with autocast.off(q.device):
        return reference.attention(q, k, v, problem)
