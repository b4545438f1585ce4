"""fused-attention verify: every backend of this machine on every case, forward and gradients, against the float64 oracle.

fused-attention verify [--backend NAME] [--cases TEXT] [--seed N]        exit status 1 where a result leaves its bound
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import dataclass, field

import torch

from fused_attention import backends

from .bounds import measure
from .cases import CASES
from .inputs import Case, Inputs
from .oracle import Truth


@dataclass
class Tally:
    """What one backend did with the cases."""

    backend: str
    unavailable: str | None
    passed: int = 0
    refused: int = 0
    used: float = 0.0
    worst: str = ""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        used = f"{self.used:.1%}" if self.used < 10 else f"{self.used:.2g} x"
        counts = (str(self.passed), str(self.refused), str(len(self.failures)))
        return self.backend, *counts, used, f"{self.seconds:.1f}", self.worst


HEADINGS = ("backend", "passed", "refused", "failed", "bound used", "seconds", "nearest to its bound")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=tuple(backends()), help="this backend alone; default: all that this machine can run")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the values of the tensors")


def run(args: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the problems are tiny: a second thread costs more than it gives
    try:
        return _verify(args)
    finally:
        torch.set_num_threads(threads)


def _verify(args: argparse.Namespace) -> int:
    reasons = {name: reason for name, reason in backends().items() if args.backend in (None, name)}
    tallies = [Tally(name, reason) for name, reason in reasons.items()]
    cases = [case for case in CASES if args.cases in case.name]
    started = time.perf_counter()
    for case in cases:
        inputs = case.make(seed=args.seed)
        truth = inputs.truth()
        for tally in tallies:
            if tally.unavailable is None:
                _try(tally, case, inputs, truth)
    _print_table([tally.cells for tally in tallies if tally.unavailable is None])
    for tally in tallies:
        if tally.unavailable is not None:
            print(f"{tally.backend} is off: {tally.unavailable}")
    failures = [failure for tally in tallies for failure in tally.failures]
    for failure in failures:
        print(failure)
    ran = sum(tally.passed for tally in tallies)
    seconds = time.perf_counter() - started
    print(f"{len(cases)} cases, forward and all gradients, against float64: {ran} passed, {len(failures)} failed, {seconds:.1f} s")
    if args.backend is not None and reasons[args.backend] is not None:
        return 1
    return int(bool(failures) or not ran)


def _try(tally: Tally, case: Case, inputs: Inputs, truth: Truth) -> None:
    started = time.perf_counter()
    try:
        report = measure(inputs.run(tally.backend), truth)
    except NotImplementedError:
        tally.refused += 1
        return
    except Exception as error:  # noqa: BLE001  # a crash is a failure of its case: the others still tell something
        tally.failures.append(f"{tally.backend}, {case.name}: {type(error).__name__}: {error}")
        return
    finally:
        tally.seconds += time.perf_counter() - started
    if report.failures:
        tally.failures += [f"{tally.backend}, {case.name}: {failure}" for failure in report.failures]
    else:
        tally.passed += 1
    if report.used > tally.used:
        worst = max(report.tensors, key=lambda tensor: tensor.used)
        tally.used, tally.worst = report.used, f"{worst.name} of {case.name}"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    try:
        rich = importlib.import_module("rich.table"), importlib.import_module("rich.console")
    except ImportError:
        widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in range(len(HEADINGS))]
        for row in (HEADINGS, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = rich[0].Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    rich[1].Console().print(table)
