"""The races behind the goals run, and what came of them: a row a rival, met or missed.

met    where the median of the runs' ratios is at least 0.97 of what it must be
run    contenders in turns, on inputs made for it, after the run before has been through all goals
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from .goals import Goal
from .timing import Protocol

MET = 0.97  # of a goal: what two runs of one program may differ by


class Pair(NamedTuple):
    """Of one run: our seconds, and a rival's over them."""

    ours: float
    ratio: float


@dataclass(frozen=True)
class Result:
    """One rival of one race."""

    title: str
    rival: str
    runs: tuple[Pair, ...]
    must: float
    aim: float | None
    flops: float | None = None

    @property
    def ours(self) -> float:
        return statistics.median(run.ours for run in self.runs)

    @property
    def ratio(self) -> float:
        return statistics.median(run.ratio for run in self.runs)

    @property
    def met(self) -> bool:
        return self.ratio >= MET * self.must

    def as_json(self) -> dict[str, Any]:
        found = {"ours": self.ours, "ratio": self.ratio, "ratios": [run.ratio for run in self.runs], "met": self.met}
        return {name: value for name, value in vars(self).items() if name != "runs"} | found


class Judged(NamedTuple):
    results: list[Result]
    left_out: dict[str, str]  # title: why


def judge(goals: Sequence[Goal], protocol: Protocol, runs: int, say: Callable[[str], None] = lambda title: None) -> Judged:
    """Every goal in every run; say: is told each goal before its race."""
    pairs: dict[tuple[str, str], list[Pair]] = {(goal.title, rival): [] for goal in goals for rival in goal.must}
    left_out: dict[str, str] = {}
    for _ in range(runs):
        for goal in goals:
            say(goal.title)
            try:
                for rival, pair in race(goal, protocol).items():
                    pairs[goal.title, rival].append(pair)
            except NotImplementedError as reason:
                left_out[goal.title] = str(reason)
    results = [
        Result(goal.title, rival, tuple(pairs[goal.title, rival]), must, goal.aim.get(rival), goal.flops)
        for goal in goals
        if goal.title not in left_out
        for rival, must in goal.must.items()
    ]
    return Judged(results, left_out)


def race(goal: Goal, protocol: Protocol) -> Mapping[str, Pair]:
    """One run, by rival."""
    prepared = goal.race()
    seconds = {name: timing.median * prepared.weights.get(name, 1.0) for name, timing in prepared.run(protocol).items()}
    ours = seconds[prepared.ours]
    return {rival: Pair(ours, seconds[rival] / ours) for rival in goal.must}


def table(results: Sequence[Result]) -> Table:
    columns = ("class, shape", "rival", "ours", "GFLOP/s", "ratio", "of runs", "must", "aim", "")
    found = Table(*columns, title="rival's time / ours; median, one thread, its own CPU time, contenders in turns")
    for result in results:
        time = f"{result.ours * 1e3:.3g} ms"
        aim = "" if result.aim is None else f"{result.aim:.2f}"
        rate = "" if result.flops is None else f"{result.flops / result.ours / 1e9:.0f}"
        ratios = sorted(run.ratio for run in result.runs)
        spread = "" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        verdict = "[green]met[/]" if result.met else "[red]missed[/]"
        found.add_row(result.title, result.rival, time, rate, f"{result.ratio:.2f}", spread, f"{result.must:.2f}", aim, verdict)
    return found
