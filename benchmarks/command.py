"""`fused-attention bench`: workloads checked and timed, speed over length plotted, a real training run; exit status 1 if a gate fails.

plan    (workload, kind, dtype) ...  ->  rows  ->  table, JSON, PNG
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from .contenders import contenders
from .environment import stamp
from .goals import goals, of_modules
from .goals_judged import Judged, judge
from .goals_judged import table as goal_table
from .goals_narrow import ISA, judge_narrow
from .measure import Row, measure
from .plot import LENGTHS, QUICK_LENGTHS, draw, sweep, sweep_workloads
from .races import SEED
from .report import as_json, failures, header, milliseconds, reasons, summary, table, write_json
from .timing import Protocol, best_gemm, keep_freed_memory
from .training import Training, train
from .workloads import DTYPES, QUICK, WORKLOADS, Kind, Workload

OUTPUT_FOLDER = Path("benchmarks-out")
STEPS, QUICK_STEPS = 300, 30
GOAL_RUNS = 3
NOT_OF_GOALS, OF_GOALS = ("workload", "dtype", "plot", "no_train", "no_plot", "seed"), ("runs",)  # arguments that would be ignored
NARROW_ROWS = ("gpt2-small",)  # also timed in bf16 when no --dtype is given
REPORT_WIDTH = 110  # of a table that goes to a file or a pipe


@dataclass(frozen=True)
class Item:
    """One group of rows."""

    workload: Workload
    kind: Kind
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a smoke run of half a minute: few workloads, rounds, lengths and steps")
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--dtype", nargs="+", choices=sorted(DTYPES), metavar="DTYPE", help="of fp32, bf16, fp16; default fp32 and a bf16 sample"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the JSON goes (default: a new file in benchmarks-out/)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="where the PNG goes (default: beside the JSON)")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="threads of every contender (default 1)")
    parser.add_argument("--no-train", action="store_true", help="leave the training run out")
    parser.add_argument("--no-plot", action="store_true", help="leave the sweep over sequence lengths and its plot out")
    parser.add_argument("--device", choices=("cpu",), help="race each class of calls of this device's backend against its goals instead")
    parser.add_argument("--preset", choices=("modules",), help="with the goals, those of the layers and modules alone")
    parser.add_argument("--runs", type=_positive, metavar="N", help="of the goals, whose medians count (default 3, and 1 with --quick)")
    parser.add_argument("--seed", type=int, metavar="N", help=f"of inputs, weights and batches (default {SEED}, and always with the goals)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected an int of at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the plan; 0 if every gate held, 1 if one did not, 2 if an output file is in the way or an argument would be ignored."""
    console = Console(soft_wrap=False)
    console = console if console.is_terminal else Console(width=REPORT_WIDTH)
    of_goals = args.device is not None or args.preset is not None
    idle = [f"--{name.replace('_', '-')}" for name in (NOT_OF_GOALS if of_goals else OF_GOALS) if getattr(args, name) not in (None, False)]
    if idle:
        beside = "the goals (--device, --preset) have no use for it" if of_goals else "only the goals have a use for it: add --device cpu"
        console.print(Text(f"{idle[0]} is given, and {beside}", style="red"))
        return 2
    paths = _paths(args)
    taken = [path for path in paths if path.exists()]
    if taken:
        console.print(Text(f"{taken[0]} exists already: give another path, or move it away", style="red"))
        return 2
    malloc = keep_freed_memory()
    protocol = Protocol(threads=args.threads)
    if args.quick:
        protocol = replace(protocol, least_rounds=3, budget=0.3)
    with _threads(args.threads):
        if of_goals:
            runs = args.runs or (1 if args.quick else GOAL_RUNS)
            return _race(args.preset, runs, console, replace(protocol, budget=protocol.budget / runs), malloc, paths[0])
        return _run(args, console, protocol, malloc, *paths)


def _race(preset: str | None, runs: int, console: Console, protocol: Protocol, malloc: str, json_path: Path) -> int:
    """The goals; 1 if one is missed."""
    environment = stamp(protocol, malloc, SEED) | {"runs": runs}
    environment["best_gemm"] = {dtype: best_gemm(DTYPES[dtype], protocol) for dtype in ("fp32", "bf16")}
    header(console, environment)
    chosen = [goal for goal in goals() if preset is None or of_modules(goal)]
    with _progress(console) as bar:
        task = bar.add_task("goals", total=len(chosen) * runs)

        def say(title: str) -> None:
            bar.update(task, description=title, advance=1)
            bar.refresh()

        found = judge(chosen, protocol, runs, say)
    _keep(found, found, console, environment, json_path)
    if preset is None:
        console.print(Text(f"Now the {ISA} kernels, in a process of their own."))
        narrow = judge_narrow(runs, protocol)
        found = Judged(found.results + narrow.results, found.left_out | narrow.left_out)
        _keep(found, narrow, console, environment, json_path)
    missed, judged = sum(not result.met for result in found.results), len(found.results)
    console.print(Text(f"{judged - missed} of {judged} goals met, {runs} runs", style="bold red" if missed else "bold green"))
    return 1 if missed else 0


def _keep(found: Judged, new: Judged, console: Console, environment: dict[str, Any], json_path: Path) -> None:
    """All that was found, in a file, before anything else can fail; shown is only what is new."""
    content = {"environment": environment, "goals": [result.as_json() for result in found.results], "left_out": found.left_out}
    write_json(json_path, content)
    console.print(goal_table(new.results))
    _print_lines(console, [f"left out: {title}: {reason}" for title, reason in new.left_out.items()])
    console.print(Text(f"JSON: {json_path}"))


def _run(args: argparse.Namespace, console: Console, protocol: Protocol, malloc: str, json_path: Path, plot_path: Path) -> int:
    start, seed = time.perf_counter(), SEED if args.seed is None else args.seed
    items = plan(args.workload, args.dtype, quick=args.quick)
    lengths = () if args.no_plot else QUICK_LENGTHS if args.quick else LENGTHS
    steps = 0 if args.no_train else QUICK_STEPS if args.quick else STEPS
    environment = stamp(protocol, malloc, seed)
    dtypes = dict.fromkeys([item.dtype for item in items] + (["fp32"] if lengths else []))
    environment["best_gemm"] = {dtype: best_gemm(DTYPES[dtype], protocol) for dtype in dtypes}
    header(console, environment)
    with _progress(console) as bar:
        rows = _measure(items, protocol, seed, bar)
        swept = _sweep(lengths, protocol, seed, bar)
        training = _train(steps, protocol, seed, bar)
    console.print()
    console.print(table(rows, environment))
    console.print()
    _print_lines(console, [*reasons([*rows, *swept]), *summary(rows)])
    if training is not None:
        _print_training(console, training)
    write_json(json_path, as_json(environment, rows, swept, training))
    console.print(Text(f"JSON: {json_path}"))
    if swept:
        draw(swept, environment, plot_path)
        console.print(Text(f"plot: {plot_path}"))
    wrong = failures(rows, swept, training)
    _print_lines(console, wrong, style="red")
    verdict = f"{len(wrong)} of the gates failed" if wrong else "every gate held"
    console.print(Text(f"{verdict}, {(time.perf_counter() - start) / 60:.1f} minutes", style="bold red" if wrong else "bold green"))
    return 1 if wrong else 0


def plan(names: list[str] | None, dtypes: list[str] | None, *, quick: bool) -> list[Item]:
    """The groups of rows in the order of the table; modules in fp32 unless a dtype is asked for."""
    chosen = [WORKLOADS[name] for name in names or (QUICK if quick else WORKLOADS)]
    kinds: tuple[Kind, ...] = ("attention", "module")
    items = [
        Item(workload, kind, dtype)
        for workload in chosen
        for dtype in dtypes or ["fp32"]
        for kind in kinds
        if kind == "attention" or workload.module is not None or workload.module_reason is not None
    ]
    if dtypes is None and names is None and not quick:
        items += [Item(WORKLOADS[name], "attention", "bf16") for name in NARROW_ROWS]
    return items


def _paths(args: argparse.Namespace) -> tuple[Path, Path]:
    stem = OUTPUT_FOLDER / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    json_path = args.json or stem.with_suffix(".json")
    plot_path = args.plot or json_path.with_suffix(".png")
    if OUTPUT_FOLDER in (json_path.parent, plot_path.parent) and not (OUTPUT_FOLDER / ".gitignore").exists():
        OUTPUT_FOLDER.mkdir(exist_ok=True)
        (OUTPUT_FOLDER / ".gitignore").write_text("*\n")  # results that count are committed by hand, elsewhere
    return json_path, plot_path


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(console: Console) -> Progress:
    # auto_refresh would wake a second thread in the middle of what is being timed.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, auto_refresh=False, transient=True)


def _measure(items: list[Item], protocol: Protocol, seed: int, bar: Progress) -> list[Row]:
    task = bar.add_task("workloads", total=len(items))
    rows: list[Row] = []
    for item in items:
        title = f"{item.workload.name} {item.kind} {item.dtype}"

        def say(step: str, title: str = title) -> None:
            bar.update(task, description=f"{title}: {step}")
            bar.refresh()

        rows += measure(item.workload, item.kind, (item.dtype, DTYPES[item.dtype]), contenders(item.kind), protocol, seed, say)
        bar.advance(task)
    bar.update(task, description="workloads")
    return rows


def _sweep(lengths: tuple[int, ...], protocol: Protocol, seed: int, bar: Progress) -> list[Row]:
    if not lengths:
        return []
    task = bar.add_task("speed over length", total=len(sweep_workloads(lengths)))

    def say(title: str) -> None:
        bar.update(task, description=f"speed over length: {title}", advance=1)
        bar.refresh()

    return sweep(lengths, replace(protocol, budget=protocol.budget / 3), seed, say)


def _train(steps: int, protocol: Protocol, seed: int, bar: Progress) -> Training | None:
    if not steps:
        return None
    task = bar.add_task("training", total=steps)

    def say(step: int) -> None:
        bar.update(task, completed=step)
        if step % 5 == 0:
            bar.refresh()

    return train(steps, protocol, seed, say)


def _print_lines(console: Console, lines: list[str], style: str = "") -> None:
    for line in lines:
        console.print(Text(line, style=style))
    if lines:
        console.print()


def _print_training(console: Console, training: Training) -> None:
    width, layers, context = (training.settings[key] for key in ("width", "layers", "context"))
    ours, theirs = (
        f"{milliseconds(timing.median)} ms (IQR {milliseconds(timing.spread)})" for timing in (training.step, training.torch_step)
    )
    model = f"GPT of {layers} layers, width {width}, context {context}, {training.parameters / 1e6:.2f} M parameters"
    text = f"{training.corpus_bytes / 2**20:.1f} MiB of the standard library's sources"
    early, late = f"{training.early_difference:.1e}", f"{training.late_difference:.2%}"
    lines = [
        f"Training: {model}, {training.steps} steps on {text}",
        f"  a step: ours {ours}, torch.nn {theirs}: {training.speedup:.2f}x",
        f"  loss: {training.losses[0]:.3f} to {training.late_mean:.3f}; apart from torch.nn's {early} in early steps, {late} in the last",
        "  it writes: " + " ".join(training.sample.split()),
    ]
    _print_lines(console, lines)
