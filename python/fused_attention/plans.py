"""The problem of a call and the backend that computes it, remembered: a call like an earlier one does not pay for its checks again.

facts of q, k, v and of every option, and which gradients are needed  ->  problem, backend
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import choose
from .call_facts import Key, facts
from .problem import Known, Problem
from .validation import check

MOST = 4096  # plans, with ever new lengths; then they are made anew


class Plan(NamedTuple):
    problem: Problem
    backend: str
    tensors: tuple[Tensor, ...]  # the options that are


class Remembered(NamedTuple):
    plan: Plan  # without the tensors of the call it was made for
    tensors: tuple[tuple[str, str], ...]  # field of the problem, option that fills it


_remembered: dict[Key, Remembered] = {}


def plan(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], backend: str | None) -> Plan:
    """The problem of a call, checked, and the name of the backend that is to compute it; raises what `check` and `choose` raise."""
    key = None if torch.compiler.is_compiling() else facts((q, k, v, backend, torch.is_grad_enabled(), *options.items()))
    known = None if key is None else _remembered.get(key)
    if known is not None:
        if not known.tensors:
            return known.plan
        given = {field: options[name] for field, name in known.tensors}
        return Plan(known.plan.problem._replace(**given), known.plan.backend, tuple(given.values()))
    problem = check(q, k, v, **options)
    fields = {field: value for field, value in problem._asdict().items() if isinstance(value, Tensor)}
    made = Plan(problem, choose(problem, backend), tuple(fields.values()))
    return made if key is None else _remember(key, made, fields, options)


def forget() -> None:
    """Every call is checked anew."""
    _remembered.clear()


def _remember(key: Key, made: Plan, fields: dict[str, Tensor], options: dict[str, Any]) -> Plan:
    if len(_remembered) >= MOST:
        forget()
    if not fields:
        known = Known(*made.problem)
        known.notes = {}
        made = made._replace(problem=known)
        _remembered[key] = Remembered(made, ())
        return made
    # A field bears the name of its option, but for the keys of packed sequences, which default to the queries'.
    tensors = tuple((field, field if field in options else "cu_seqlens_q") for field in fields)
    nothing: dict[str, Any] = dict.fromkeys(fields)
    _remembered[key] = Remembered(Plan(made.problem._replace(**nothing), made.backend, ()), tensors)
    return made
