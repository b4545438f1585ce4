"""fused-attention verify: every backend on every device of this machine, every case, forward and gradients, against the float64 oracle.

fused-attention verify [--device NAME] [--backend NAME] [--cases TEXT] [--seed N]        exit status 1 where a result leaves its bound
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import dataclass, field

import torch

from fused_attention import backends
from fused_attention.backend import ELSEWHERE, ORDER, REFERENCE

from .bounds import measure
from .cases import CASES
from .inputs import Case, Inputs
from .oracle import Truth


@dataclass
class Tally:
    """What one backend did with the cases on one device."""

    device: torch.device
    backend: str
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
        return str(self.device), self.backend, *counts, used, f"{self.seconds:.1f}", self.worst


HEADINGS = ("device", "backend", "passed", "refused", "failed", "bound used", "seconds", "nearest to its bound")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, metavar="NAME", help="cpu, cuda or cuda:N; default: cpu, and cuda where torch has one")
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device of torch's, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is not checked, only cpu and cuda: the oracle needs float64 on the device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _verify(args: argparse.Namespace) -> int:
    devices = _devices() if args.device is None else [args.device]
    reasons = {name: reason for name, reason in backends().items() if args.backend in (None, name)}
    tallies = [Tally(device, name) for device in devices for name in _runnable(device) if name in reasons and reasons[name] is None]
    cases = [case for case in CASES if args.cases in case.name]
    started = time.perf_counter()
    for device in devices:
        here = [tally for tally in tallies if tally.device == device]
        for case in cases if here else ():
            inputs = case.make(device, seed=args.seed)
            truth = inputs.truth()
            for tally in here:
                _try(tally, case, inputs, truth)
    _print_table([tally.cells for tally in tallies])
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name} is off: {reason}")
        elif args.backend is not None and not tallies:
            print(f"{name} is off: it computes nothing on {', '.join(map(str, devices))}")
    failures = [failure for tally in tallies for failure in tally.failures]
    for failure in failures:
        print(failure)
    ran = sum(tally.passed for tally in tallies)
    seconds = time.perf_counter() - started
    print(f"{len(cases)} cases, forward and all gradients, against float64: {ran} passed, {len(failures)} failed, {seconds:.1f} s")
    return int(bool(failures) or not ran)


def _runnable(device: torch.device) -> tuple[str, ...]:
    """The backends that take tensors of the device."""
    return (*ORDER.get(device.type, ELSEWHERE), REFERENCE)


def _try(tally: Tally, case: Case, inputs: Inputs, truth: Truth) -> None:
    started = time.perf_counter()
    try:
        report = measure(inputs.run(tally.backend), truth)
    except NotImplementedError:
        tally.refused += 1
        return
    except Exception as error:  # noqa: BLE001  # a crash is a failure of its case: the others still tell something
        tally.failures.append(f"{tally.device}: {tally.backend}, {case.name}: {type(error).__name__}: {error}")
        return
    finally:
        tally.seconds += time.perf_counter() - started
    if report.failures:
        tally.failures += [f"{tally.device}: {tally.backend}, {case.name}: {failure}" for failure in report.failures]
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
    table = rich[0].Table(box=None)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", no_wrap=heading != HEADINGS[-1])  # where it is narrow, the last column folds
    for row in rows:
        table.add_row(*row)
    rich[1].Console().print(table)
