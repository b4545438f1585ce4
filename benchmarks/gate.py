"""Whether a result that was timed is right; a row whose gate fails shows no speed.

    ours, attention    a slice (last batch member, last kv head) within its elementwise bound, and the whole as below
    any attention      slice and whole right to half the digits of the dtype:  |got - truth|_2 <= sqrt(u) |truth|_2
    modules            per tensor  max |got - truth| <= 2 (the error of torch.nn's module + u max |truth|)

Truth is the float64 oracle on the slice, the `reference` backend on the whole, torch.nn's module in float64 for modules; u is the unit
roundoff of the dtype. The slice is at the end of every tensor, where strides and partial tiles go wrong first. Where scores would fill
the memory there is no slice, and the whole is compared with the `torch` backend in float32, which works in blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_attention
from fused_attention.testing import TensorReport, Truth, measure, oracle
from fused_attention.testing.tier1 import UNIT_ROUNDOFF

from .contenders import Run, run_module
from .workloads import AttentionInputs, Direction, ModuleInputs

FORWARD = ("out", "lse")
LARGEST_SLICE, LARGEST_WHOLE = 2**24, 2**28  # pairs of a head and of the whole, visible or not, whose scores may be held at once


@dataclass(frozen=True)
class Verdict:
    """used: the largest share of a bound, or without a slice of half the digits; failure: None, or why the result counts as wrong."""

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
        self._packed = workload.lengths is not None
        self._backward = workload.backward
        self._half_digits = math.sqrt(UNIT_ROUNDOFF[inputs.q.dtype])
        self._queries = slice(workload.heads - workload.group, None)
        pairs = workload.seqlen_q * workload.seqlen_k
        self._slice = self._exact(inputs) if pairs <= LARGEST_SLICE else None
        self._whole = self._reference(inputs, in_blocks=pairs * workload.batch * workload.heads > LARGEST_WHOLE)

    def _exact(self, inputs: AttentionInputs) -> Truth:
        options = dict(inputs.options)
        if "kv_lengths" in options:
            options["kv_lengths"] = options["kv_lengths"][-1:]
        if "bias" in options:
            options["bias"] = options["bias"][:, self._queries]
        q, dout = (self._part("dq", tensor) for tensor in (inputs.q, inputs.dout))
        k, v = (self._part("dk", tensor) for tensor in (inputs.k, inputs.v))
        return oracle(q, k, v, dout=dout if self._backward else None, **options)

    def _reference(self, inputs: AttentionInputs, *, in_blocks: bool) -> Results:
        leaves, dout = inputs.leaves, inputs.dout
        if in_blocks:
            leaves = {name: leaf.detach().float().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
            dout = dout.float()
        call = fused_attention.attention_varlen_with_lse if self._packed else fused_attention.attention_with_lse
        options = inputs.options | ({"bias": leaves["dbias"]} if "dbias" in leaves else {})
        out, lse = call(leaves["dq"], leaves["dk"], leaves["dv"], **options, backend="torch" if in_blocks else "reference")
        gradients = torch.autograd.grad(out, tuple(leaves.values()), dout) if self._backward else ()
        return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, gradients, strict=False))

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """The slice of a tensor that is laid out as the one of this name."""
        heads = slice(-1, None) if name in ("dk", "dv") else self._queries
        if self._packed:
            return tensor.detach()[heads] if name == "lse" else tensor.detach()[:, heads]
        return tensor.detach()[-1:, heads]

    def judge(self, results: Results, *, bounded: bool) -> dict[Direction, Verdict]:
        """The verdict on each direction that has results; bounded: the slice must stay within its elementwise bound."""
        sliced: dict[str, TensorReport] = {}
        if self._slice is not None:
            # The gradient of a bias is a sum over the batch, of which the slice is a part.
            parts = {name: self._part(name, tensor) for name, tensor in results.items() if name != "dbias"}
            try:
                sliced = {report.name: report for report in measure(parts, self._slice).tensors}
            except AssertionError as wrong_form:
                return {direction: Verdict(math.inf, str(wrong_form)) for direction in ("forward", "backward")}
        verdicts: dict[Direction, list[Verdict]] = {"forward": [], "backward": []}
        for name, tensor in results.items():
            verdict, report = self._by_norm(name, tensor), sliced.get(name)
            if report is not None:
                failure = str(report) if bounded and not report.used <= 1.0 else verdict.failure
                verdict = Verdict(report.used, failure)
            verdicts["forward" if name in FORWARD else "backward"].append(verdict)
        return {direction: Verdict.worst(found) for direction, found in verdicts.items() if found}

    def _by_norm(self, name: str, got: Tensor) -> Verdict:
        places = {"the whole": (got, self._whole[name])}
        if self._slice is not None and name != "dbias":
            places = {"its last head": (self._part(name, got), self._slice.values[name])} | places
        verdicts = []
        for place, (part, truth) in places.items():
            distance = _relative_distance(part, truth)
            wrong = f"{name} is off by {distance:.2g} of its size in {place}, expected at most {self._half_digits:.1e}, half its digits"
            verdicts.append(Verdict(distance / self._half_digits, None if distance <= self._half_digits else wrong))
        return Verdict.worst(verdicts)


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
