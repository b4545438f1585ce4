"""One run on a GPU that decides which experiment pays: each cell of the grid in a process of its own, under a limit of its own.

python -m fused_attention.benchmarks.experiments [--cells NAME ...] [--out FOLDER] [--until TIME] [--record FILE]

A variant that hangs or crashes costs its cell's limit once: the cell is begun again without it, and so are all that follow. The table goes
to standard output, JSON to FOLDER/<machine>/experiments.json after every cell. Exit status 1 if a variant was wrong, crashed or hung.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fused_attention.benchmarks.record import Record

from .grid import GRID, TIMING, rehearsal
from .report import finished, folder_name, table

CELL_SECONDS = 75  # the first compiles every kernel of its head_dim
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    chosen = [cell for cell in GRID if args.cells is None or cell.name in args.cells]
    if args.race is not None:
        from . import race

        cell = next(cell for cell in GRID if cell.name == args.race)
        race.run(rehearsal(cell) if args.rehearse else cell, args.without, args.rehearse)
        return 0
    environment = _environment()
    path = args.out / folder_name(environment) / "experiments.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record, lost, cells = Record(args.record), list[str](), list[dict[str, Any]]()
    for cell in chosen:
        if not record.claim(cell.name):
            continue
        if time.time() > args.until:
            record.ended(cell.name, "left out", message="the time of the step was over")
            continue
        command = [*args.child, "--race", cell.name, *(["--rehearse"] if args.rehearse else [])]
        facts = run_cell(command, lost, args.limit)
        cells.append(finished(rehearsal(cell) if args.rehearse else cell, cell.name, facts))
        path.write_text(json.dumps({"schema": 1, "environment": environment, "cells": cells}, indent=1) + "\n")
        wrong = ", ".join(cells[-1]["wrong"])
        record.ended(cell.name, "failed" if wrong else "passed", message=wrong, cell=cells[-1])
    print(table(cells))
    print(f"JSON: {path}")
    return int(any(cell["wrong"] for cell in cells))


def run_cell(command: list[str], lost: list[str], limit: float) -> list[dict[str, Any]]:
    """What a cell's processes said; `lost` grows by every variant that one of them died of."""
    said: list[dict[str, Any]] = []
    while True:
        facts, end = _listen([*command, "--without", *lost], limit)
        said += facts
        began = next((fact["began"] for fact in reversed(facts) if "began" in fact), None)
        if end is None or began is None or "checked" in facts[-1] or began == TIMING:
            return said if end is None else [*said, {"lost": began or "the process", "reason": end}]
        lost.append(began)
        said.append({"checked": began, "reason": end, "share": None})


def _listen(command: list[str], limit: float) -> tuple[list[dict[str, Any]], str | None]:
    """The facts that a process said, and how it ended if not well."""
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        output, end = made.stdout, None if made.returncode == 0 else f"ended with status {made.returncode}: {_last(made.stderr)}"
    except subprocess.TimeoutExpired as late:
        output, end = (
            (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or "",
            f"hung for {limit:.0f} seconds",
        )
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")], end


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def _environment() -> dict[str, Any]:
    """The stamp of a run, made by a process of its own: this one stays free of the device, and outlives those that lose it."""
    made = subprocess.run(
        [sys.executable, "-m", "fused_attention.benchmarks.device_environment"], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Races the experimental kernels against the product's and torch's on a GPU.")
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in GRID], metavar="NAME", help="these alone")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where <machine>/experiments.json goes")
    parser.add_argument("--limit", type=float, default=CELL_SECONDS, metavar="SECONDS", help="of one process")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a line for every cell that began or ended")
    parser.add_argument("--until", type=float, default=math.inf, metavar="TIME", help="seconds since 1970 after which nothing is begun")
    parser.add_argument("--rehearse", action="store_true", help="small cells on the CPU, for Triton's interpreter: TRITON_INTERPRET=1")
    parser.add_argument("--race", choices=[cell.name for cell in GRID], help=argparse.SUPPRESS)  # what a child is told
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.set_defaults(child=[sys.executable, "-m", __spec__.parent])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
