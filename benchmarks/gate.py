"""Whether a result that was timed is right; a row whose gate fails shows no speed.

    ours, attention    a slice (last batch member, last kv head) within its elementwise bound, and the whole as below
    any attention      slice and whole right to half the digits of the dtype:  |got - truth|_2 <= sqrt(u) |truth|_2
    modules            per tensor  max |got - truth| <= 2 (the error of torch.nn's module + u max |truth|)

Truth is the float64 oracle on the slice, the `reference` backend on the whole, torch.nn's module in float64 for modules; u is the unit
roundoff of the dtype. The slice is at the end of every tensor, where strides and partial tiles go wrong first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_attention
from fused_attention.testing import measure
from fused_attention.testing.oracle import oracle
from fused_attention.testing.tier1 import UNIT_ROUNDOFF

from .contenders import Run, run_module
from .workloads import AttentionInputs, Direction, ModuleInputs

FORWARD = ("out", "lse")


@dataclass(frozen=True)
class Verdict:
    """used: the largest share of a bound; failure: None, or the sentence why the result counts as wrong."""

    used: float
    failure: str | None

    @classmethod
    def worst(cls, verdicts: list[Verdict]) -> Verdict:
        failures = [verdict.failure for verdict in verdicts if verdict.failure is not None]
        return cls(max((verdict.used for verdict in verdicts), default=0.0), failures[0] if failures else None)


Results = Mapping[str, Tensor]  # out, lse where there is one, and gradients by name


class AttentionGate:
    """Judges any contender on one set of inputs."""

    def __init__(self, inputs: AttentionInputs) -> None:
        workload = inputs.workload
        self._backward = workload.backward
        self._half_digits = math.sqrt(UNIT_ROUNDOFF[inputs.q.dtype])
        self._queries = slice(workload.heads - workload.group, None)
        q, dout = (self._part("dq", tensor) for tensor in (inputs.q, inputs.dout))
        k, v = (self._part("dk", tensor) for tensor in (inputs.k, inputs.v))
        options: dict[str, Any] = {name: value[-1:] if isinstance(value, Tensor) else value for name, value in inputs.options.items()}
        self._truth = oracle(q, k, v, dout=dout if self._backward else None, **options)
        self._whole = self._reference(inputs)

    def _reference(self, inputs: AttentionInputs) -> Results:
        leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
        out, lse = fused_attention.attention_with_lse(inputs.q, inputs.k, inputs.v, backend="reference", **inputs.options)
        gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs.dout) if self._backward else ()
        return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, gradients, strict=False))

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach()[-1:, -1:] if name in ("dk", "dv") else tensor.detach()[-1:, self._queries]

    def judge(self, results: Results, *, bounded: bool) -> dict[Direction, Verdict]:
        """The verdict on each direction that has results; bounded: the slice must stay within its elementwise bound."""
        try:
            report = measure({name: self._part(name, tensor) for name, tensor in results.items()}, self._truth)
        except AssertionError as wrong_form:
            return {direction: Verdict(math.inf, str(wrong_form)) for direction in ("forward", "backward")}
        verdicts: dict[Direction, list[Verdict]] = {"forward": [], "backward": []}
        for tensor in report.tensors:
            failure = str(tensor) if bounded and not tensor.used <= 1.0 else self._far_off(tensor.name, results[tensor.name])
            verdicts["forward" if tensor.name in FORWARD else "backward"].append(Verdict(tensor.used, failure))
        return {direction: Verdict.worst(found) for direction, found in verdicts.items() if found}

    def _far_off(self, name: str, got: Tensor) -> str | None:
        places = {"its last head": (self._part(name, got), self._truth.values[name]), "the whole": (got, self._whole[name])}
        for place, (part, truth) in places.items():
            distance = _relative_distance(part, truth)
            if not distance <= self._half_digits:
                return f"{name} is off by {distance:.2g} of its size in {place}, expected at most {self._half_digits:.1e}, half its digits"
        return None


def _relative_distance(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        return math.inf
    got, truth = got.detach().double(), truth.double()
    equal = got == truth  # infinities of the same sign
    distance = torch.where(equal, 0.0, got - truth).norm()
    size = truth.masked_fill(truth.isinf(), 0.0).norm()
    return float(distance / size) if float(size) > 0.0 else (0.0 if float(distance) == 0.0 else math.inf)


class ModuleGate:
    """Judges modules against the float64 truth, by the error that torch.nn's own module makes in the same dtype."""

    def __init__(self, inputs: ModuleInputs, weights: nn.Module) -> None:
        self._truth = self._evaluate(self._exact(inputs), copy.deepcopy(weights).double())
        unit = UNIT_ROUNDOFF[inputs.x.dtype]
        self._allowed = {
            name: 2.0 * (_largest(tensor.double() - self._truth[name]) + unit * _largest(self._truth[name]))
            for name, tensor in self._evaluate(inputs, weights).items()
        }

    @staticmethod
    def _exact(inputs: ModuleInputs) -> ModuleInputs:
        x = inputs.x.detach().double().requires_grad_()
        memory = inputs.memory.detach().double().requires_grad_() if inputs.workload.cross else x
        return ModuleInputs(inputs.workload, x, memory, inputs.dout.double(), inputs.padding)

    @staticmethod
    def _evaluate(inputs: ModuleInputs, module: nn.Module) -> Results:
        run = run_module(module, inputs, needs_mask=True)
        run.enter("backward")
        return results_of(run)

    def judge(self, results: Results, *, bounded: bool) -> dict[Direction, Verdict]:
        del bounded  # one rule for all: what torch.nn may err, others may
        verdicts: dict[Direction, list[Verdict]] = {"forward": [], "backward": []}
        for name, got in results.items():
            error, allowed = _largest(got.double() - self._truth[name]), self._allowed[name]
            used = error / allowed if allowed > 0.0 else (0.0 if error == 0.0 else math.inf)
            failure = None if used <= 1.0 else f"{name} errs by {error:.2g}, twice the error of torch.nn's module allows {allowed:.2g}"
            verdicts["forward" if name in FORWARD else "backward"].append(Verdict(math.inf if math.isnan(used) else used, failure))
        return {direction: Verdict.worst(found) for direction, found in verdicts.items() if found}


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def results_of(run: Run) -> Results:
    """out and every gradient of a run, by name."""
    out = run.forward()
    gradients = torch.autograd.grad(out, tuple(run.leaves.values()), run.dout)
    return {"out": out.detach()} | dict(zip(run.leaves, gradients, strict=True))
