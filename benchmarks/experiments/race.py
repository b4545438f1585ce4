"""One cell of the grid in one process: every variant checked against float64 and against the plain kernel, then timed beside the rivals.

Each line on standard output is a fact as JSON, said at once, so that whoever waits knows what a process died of:

    {"began": "s-ahead"}    {"checked": "s-ahead", "share": 0.2, "reason": null}    {"refused": "cuDNN", "reason": "..."}
    {"began": "timing"}     {"milliseconds": {"s-ahead": 1.9}}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from fused_attention.benchmarks.device_timing import DeviceProtocol
from fused_attention.benchmarks.gate import AttentionGate
from fused_attention.benchmarks.rivals import sdpa
from fused_attention.benchmarks.timing import Protocol
from fused_attention.benchmarks.workloads import AttentionInputs, Workload, attention_inputs
from torch.nn.attention import SDPBackend

from .grid import TIMING
from .variants import FORWARD, GLUON, GRADIENTS, Call, Variant

SEED = 0
DEVICE_LOST = 3  # exit status: the process can compute nothing any more, a new one may go on
RIVALS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Say = Callable[[dict[str, Any]], None]


def say(fact: dict[str, Any]) -> None:
    print(json.dumps(fact), flush=True)


def race(workload: Workload, variants: Mapping[str, Variant], protocol: Protocol, tell: Say = say) -> None:
    """A variant that is refused or wrong is not timed; rivals, who compute out alone, are only timed: torch answers for them."""
    dtype = torch.bfloat16 if protocol.device == "cuda" else torch.float16  # the interpreter has no bfloat16
    inputs = attention_inputs(workload, dtype, SEED, protocol.device)
    gate = AttentionGate(inputs)
    calls: dict[str, Callable[[], Any]] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, variant in variants.items():
        tell({"began": name})
        call, reason, share = judged(variant, inputs, gate, expected)
        tell({"checked": name, "reason": reason, "share": share})
        if call is not None and reason is None:
            calls[name] = call
    for name, backend in RIVALS.items() if not workload.backward else ():
        rival, reason = accepted(inputs, backend)
        if rival is not None:
            calls[name] = rival
        else:
            tell({"refused": name, "reason": reason})
    tell({"began": TIMING})
    timings, _ = protocol.time_in_turns(calls)
    tell({"milliseconds": {name: 1e3 * timing.median for name, timing in timings.items()}})


def judged(
    variant: Variant, inputs: AttentionInputs, gate: AttentionGate, expected: dict[str, torch.Tensor]
) -> tuple[Call | None, str | None, float | None]:
    """The call, why its results do not count, and their share of the error allowed; the first results, the plain kernel's, are `expected`.

    It is called twice, for a race of threads may show only once.
    """
    try:
        call = variant(inputs)
        found, again = call(), call()
    except Exception as refusal:  # noqa: BLE001  # a kernel may refuse in any way
        end_if_lost(inputs.q.device, refusal)
        return None, first_line(refusal), None
    verdict = next(iter(gate.judge(found, bounded=True).values()))
    reason = verdict.failure
    if reason is not None and expected:
        distance = max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())
        reason += f"; from the plain kernel it differs by at most {distance:.2g}"
    if reason is None and not all(torch.equal(found[name], again[name]) for name in found):
        reason = "a second call gave other bits"
    if not expected:
        expected.update(found)
    return call, reason, verdict.used


def accepted(inputs: AttentionInputs, backend: SDPBackend) -> tuple[Callable[[], Any] | None, str | None]:
    """A rival's call, or why there is none."""
    try:
        forward = sdpa(inputs, backend).forward
        forward()
    except Exception as refusal:  # noqa: BLE001
        return None, first_line(refusal)
    return forward, None


def end_if_lost(device: torch.device, error: Exception) -> None:
    """Ends the process, before it says anything of who failed, where the error lost it the device: all that follow would fail with it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        print(first_line(error), file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)  # an orderly end would wait for the device


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run(workload: Workload, without: Collection[str], rehearse: bool) -> None:
    protocol = Protocol(least_rounds=1, most_rounds=1, budget=0.0) if rehearse else DeviceProtocol()
    variants = GRADIENTS if workload.backward else FORWARD
    left_out = {*without, *(GLUON if rehearse else ())}
    race(workload, {name: variant for name, variant in variants.items() if name not in left_out}, protocol)
