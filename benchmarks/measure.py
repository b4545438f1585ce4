"""One workload from inputs to rows: every contender prepared, timed in turns forward and backward, and judged on what was timed.

row   workload, kind, dtype, direction, contender -> time, speed, memory and error, or the reason why there are none
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .contenders import NAIVE, TORCH_MODULE, Contender, Run, torch_module
from .gate import AttentionGate, ModuleGate, Verdict
from .timing import Protocol, Timing
from .workloads import Direction, Kind, Workload, attention_flops, attention_inputs, module_flops, module_inputs


@dataclass(frozen=True)
class Row:
    """One line of the table. A row whose gate failed keeps its error and its reason, and loses every speed."""

    workload: str
    kind: Kind
    dtype: str
    direction: Direction
    contender: str
    ours: bool
    flops: float = 0.0  # of one call
    backend: str | None = None
    timing: Timing | None = None
    flops_per_second: float | None = None
    extra_bytes: int | None = None
    error_share: float | None = None
    failed: bool = False
    reason: str | None = None
    over_naive: float | None = None  # naive's median over this row's: above 1, this row is faster
    over_rival: float | None = None  # the best rival's median over this row's

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.workload, self.kind, self.dtype, self.direction, self.contender


@dataclass
class _Entry:
    """A contender while its workload runs."""

    contender: Contender
    run: Run | None = None
    refusals: dict[Direction, str] = field(default_factory=dict)
    timings: dict[Direction, Timing] = field(default_factory=dict)
    extra: dict[Direction, int] = field(default_factory=dict)
    verdicts: dict[Direction, Verdict] = field(default_factory=dict)

    def able(self, direction: Direction) -> Run | None:
        return None if direction in self.refusals else self.run


def measure(
    workload: Workload,
    kind: Kind,
    dtype: tuple[str, torch.dtype],
    contenders: Sequence[Contender],
    protocol: Protocol,
    seed: int,
    say: Callable[[str], None] = lambda step: None,
) -> list[Row]:
    """The rows of one workload and kind, ours and rivals, forward and backward."""
    if kind == "module" and workload.module is None:
        return [Row(workload.name, kind, dtype[0], "forward", TORCH_MODULE, ours=False, reason=workload.module_reason)]
    say("inputs and truth")
    gate, prepare = _open(workload, kind, dtype[1], seed, protocol.device)
    entries = [_Entry(contender) for contender in contenders]
    for entry in entries:
        _prepare(entry, prepare, workload)
    results: dict[str, dict[str, Tensor]] = {entry.contender.name: {} for entry in entries}
    for direction in workload.directions:
        say(direction)
        _time(entries, direction, protocol, results)
    say("check")
    for entry in entries:
        if entry.run is not None:
            entry.verdicts = gate.judge(results[entry.contender.name], bounded=entry.contender.ours)
    flops = attention_flops if kind == "attention" else module_flops
    work = {direction: flops(workload, direction) for direction in workload.directions}
    return with_ratios([_row(entry, workload, kind, dtype[0], direction, count) for entry in entries for direction, count in work.items()])


def _open(
    workload: Workload, kind: Kind, dtype: torch.dtype, seed: int, device: str
) -> tuple[AttentionGate | ModuleGate, Callable[[Contender], Run]]:
    if kind == "attention":
        inputs = attention_inputs(workload, dtype, seed, device)
        return AttentionGate(inputs), lambda contender: contender.prepare(inputs)
    layers = module_inputs(workload, dtype, seed)
    weights = torch_module(workload, dtype, seed)
    return ModuleGate(layers, weights), lambda contender: contender.prepare(layers, weights)


def _prepare(entry: _Entry, prepare: Callable[[Contender], Run], workload: Workload) -> None:
    """Runs every direction once, so that a refusal comes before the clock starts; who can't go backward may still go forward."""
    direction: Direction = "forward"
    try:
        entry.run = prepare(entry.contender)
        _forward(entry.run)()
        if workload.backward:
            direction = "backward"
            _backward(entry.run)()
    except Exception as refusal:  # noqa: BLE001  # a rival may fail in any way; for ours every refusal is a failed row
        directions = workload.directions if direction == "forward" else (direction,)
        entry.refusals = dict.fromkeys(directions, _first_line(refusal))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _time(entries: list[_Entry], direction: Direction, protocol: Protocol, results: dict[str, dict[str, Tensor]]) -> None:
    """Times one direction of all contenders in turns, and keeps the results of the last timed calls."""
    functions: dict[str, Callable[[], Any]] = {}
    for entry in entries:
        run = entry.able(direction)
        if run is not None:
            run.enter(direction)
            functions[entry.contender.name] = _forward(run) if direction == "forward" else _backward(run)
    timings, last = protocol.time_in_turns(functions)
    for entry in entries:
        name, run = entry.contender.name, entry.able(direction)
        if run is None:
            continue
        entry.timings[direction] = timings[name]
        entry.extra[direction] = protocol.extra_bytes(functions[name])
        if direction == "backward":
            results[name] |= dict(zip(run.leaves, last[name], strict=True))
            continue
        results[name]["out"] = last[name]
        if run.lse is not None:
            results[name]["lse"] = run.lse().detach()


def _forward(run: Run) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run.forward()

    return forward


def _backward(run: Run) -> Callable[[], tuple[Tensor, ...]]:
    out = run.forward()
    leaves = tuple(run.leaves.values())
    return lambda: torch.autograd.grad(out, leaves, run.dout, retain_graph=True)


def _row(entry: _Entry, workload: Workload, kind: Kind, dtype: str, direction: Direction, flops: float) -> Row:
    row = Row(workload.name, kind, dtype, direction, entry.contender.name, entry.contender.ours, flops)
    if entry.run is None or direction in entry.refusals:
        # Ours has to run every workload; a rival may say that it cannot.
        return replace(row, reason=entry.refusals.get(direction), failed=entry.contender.ours)
    verdict = entry.verdicts.get(direction, Verdict(float("inf"), f"no result of the {direction} pass was judged"))
    row = replace(row, backend=entry.run.backend, error_share=verdict.used)
    if verdict.failure is not None:
        return replace(row, failed=True, reason=verdict.failure)
    timing = entry.timings[direction]
    return replace(row, timing=timing, flops_per_second=flops / timing.median, extra_bytes=entry.extra[direction])


def with_ratios(rows: list[Row]) -> list[Row]:
    """Fills in each row's ratio to the naive form and to the best rival of the same direction."""

    def fastest(direction: Direction, wanted: Callable[[Row], bool]) -> float | None:
        medians = [row.timing.median for row in rows if row.timing is not None and row.direction == direction and wanted(row)]
        return min(medians, default=None)

    def ratio(row: Row, other: float | None) -> float | None:
        return None if row.timing is None or other is None else other / row.timing.median

    return [
        replace(
            row,
            over_naive=ratio(row, fastest(row.direction, lambda other: other.contender == NAIVE)),
            over_rival=ratio(row, fastest(row.direction, lambda other: not other.ours)),
        )
        for row in rows
    ]
