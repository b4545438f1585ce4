"""What a run says: the table in the terminal, a line a workload, and the JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .environment import one_line
from .measure import Row
from .training import Training
from .workloads import DTYPES, WORKLOADS, decode_bytes

SCHEMA = 1
CONVENTION = "GFLOP/s: 2 (head_dim + head_dim_v) a visible pair, backward 2.5 times that; modules add 2 a weight and token, backward 4"
MODULES: dict[str | None, str] = {"layer": "TransformerEncoderLayer", "attention": "MultiheadAttention"}
COLUMNS = {  # and their widths
    "pass": 9, "contender": 26, "ms": 8, "± IQR": 7, "x naive": 8, "x rival": 8, "GFLOP/s": 8, "% GEMM": 7, "MiB": 8, "error": 7,
}  # fmt: skip


def as_json(environment: dict[str, Any], rows: Sequence[Row], sweep: Sequence[Row], training: Training | None) -> dict[str, Any]:
    """One JSON object: schema, environment stamp, rows, the plot's rows and the training run. Times are seconds."""
    return {
        "schema": SCHEMA,
        "flop_convention": CONVENTION,
        "environment": environment,
        "workloads": {name: asdict(WORKLOADS[name]) for name in dict.fromkeys(row.workload for row in rows)},
        "rows": [_finite(asdict(row)) for row in rows],
        "sweep": [_finite(asdict(row)) for row in sweep],
        "training": None if training is None else _finite(asdict(training)),
        "passed": not failures(rows, sweep, training),
    }


def _finite(value: Any) -> Any:
    """JSON has no inf or nan: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def failures(rows: Sequence[Row], sweep: Sequence[Row], training: Training | None) -> list[str]:
    """A sentence for every gate that did not hold."""
    found = [
        f"{row.workload} {row.kind} {row.dtype} {row.direction}, {row.contender}: {row.reason or 'no reason was given'}"
        for row in (*rows, *sweep)
        if row.failed
    ]
    return found + ([f"training: {failure}" for failure in training.failures] if training is not None else [])


def header(console: Console, environment: dict[str, Any]) -> None:
    peaks = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in environment["best_gemm"].items())
    console.print(Text(one_line(environment), style="bold"))
    console.print(Text(f"% GEMM: of the best matrix product measured here, GFLOP/s: {peaks}. Load average {environment['load_average']}."))
    console.print(Text(f"{CONVENTION}."))
    console.print(
        Text(
            "x: that rival's time over this row's, above 1 is faster. MiB: the most that torch's allocator held beyond the inputs. "
            "error: largest share of its bound, ours fails above 100 %."
        )
    )


def table(rows: Sequence[Row], environment: dict[str, Any]) -> Group:
    """All rows, a section a workload, 105 columns wide."""
    parts: list[Text | Table] = [_columns(show_header=True)]
    for (name, kind, dtype), group in groupby(rows, key=lambda row: (row.workload, row.kind, row.dtype)):
        section = _columns(show_header=False)
        for direction, members in groupby(sorted(group, key=lambda row: row.direction != "forward"), key=lambda row: row.direction):
            for index, row in enumerate(members):
                style = "red" if row.failed else "bold" if row.ours else ""
                section.add_row(direction if index == 0 else "", *_cells(row, environment), style=style)
        title = Text.assemble((_title(name, kind, dtype), "bold cyan"), (f"  {WORKLOADS[name].shape()}", "cyan"))
        parts += [title, section]
    return Group(*parts)


def _columns(*, show_header: bool) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold", show_header=show_header)
    for column, width in COLUMNS.items():
        made.add_column(column, width=width, justify="left" if column in ("pass", "contender") else "right", no_wrap=True)
    return made


def _title(name: str, kind: str, dtype: str) -> str:
    workload = WORKLOADS[name]
    what = "attention" if kind == "attention" else MODULES.get(workload.module, "torch.nn's modules")
    return f"{workload.title} · {what} · {dtype}"


def _cells(row: Row, environment: dict[str, Any]) -> list[str]:
    name = f"{row.contender} ({row.backend})" if row.backend else row.contender
    error = "" if row.error_share is None else share(row.error_share)
    if row.timing is None or row.flops_per_second is None or row.extra_bytes is None:
        return [name, "wrong" if row.error_share is not None else "-", "", "", "", "", "", "", error]
    peak = environment["best_gemm"].get(row.dtype)
    return [
        name,
        milliseconds(row.timing.median),
        milliseconds(row.timing.spread),
        _ratio(row.over_naive),
        _ratio(row.over_rival),
        f"{row.flops_per_second / 1e9:.0f}",
        "" if not peak else f"{row.flops_per_second / peak:.0%}",
        f"{row.extra_bytes / 2**20:.1f}",
        error,
    ]


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(value: float) -> str:
    if value < 0.1:
        return f"{value:.1%}"
    return f"{value:.0%}" if value < 9.995 else f"{value:.0f}x" if value < 1e4 else ">9999x"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def reasons(rows: Sequence[Row]) -> list[str]:
    """A line for every row without a speed, the same sentence once."""
    silent = (row for row in rows if row.timing is None and row.reason is not None)
    return list(dict.fromkeys(f"{row.workload} {row.kind} {row.dtype}, {row.contender}: {row.reason}" for row in silent))


def summary(rows: Sequence[Row]) -> list[str]:
    """One line a workload: how ours stands against the naive form and the best rival."""
    lines = []
    for (name, kind, dtype), group in groupby(rows, key=lambda row: (row.workload, row.kind, row.dtype)):
        parts = [_standing(row) for row in group if row.ours]
        if parts:
            lines.append(f"{_title(name, kind, dtype)}: {'; '.join(parts)}")
    return lines


def _standing(row: Row) -> str:
    if row.timing is None:
        return f"{row.direction} {'wrong' if row.failed else 'not run'}"
    ratios = {"best rival": row.over_rival, "naive": row.over_naive}
    found = [f"{_ratio(ratio)}x {rival}" for rival, ratio in ratios.items() if ratio is not None]
    if row.workload.startswith("decode"):
        rate = decode_bytes(WORKLOADS[row.workload], DTYPES[row.dtype]) / row.timing.median
        found.append(f"{rate / 1e9:.0f} GB/s of k and v")
    return f"{row.direction} {', '.join(found) or milliseconds(row.timing.median) + ' ms'}"
