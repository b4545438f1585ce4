"""What a run on a GPU measured, as a table: TFLOP/s of every contender beside ours, the share of the best rival, host time, reasons.

python -m fused_attention.benchmarks.device_report RECORD
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .contenders import OURS

CONVENTION = (
    "TFLOP/s of kernel time: 4 head_dim a visible pair, backward 2.5 times that; medians, L2 flushed, in turns; decode: GB/s of k and v.\n"
    "x: time of the best rival over ours, above 1 ours is faster. wrong: the gate failed. -: refused, for the reason above."
)
Entry = dict[str, Any]


def ended(path: Path) -> list[Entry]:
    """The items that a record holds to their end."""
    entries = (json.loads(line) for line in path.read_text().splitlines())
    return [entry for entry in entries if entry["event"] == "ended"]


def report(entries: Sequence[Entry]) -> str:
    rows = [entry for entry in entries if entry.get("rows")]
    contenders = list(dict.fromkeys(row["contender"] for entry in rows for row in entry["rows"]))
    table = [["", "", *("ours" if name == OURS else name for name in contenders), "x"]]
    for entry in rows:
        for direction in dict.fromkeys(row["direction"] for row in entry["rows"]):
            found = {row["contender"]: row for row in entry["rows"] if row["direction"] == direction}
            cells = [_speed(found.get(name), entry["workload"]) for name in contenders]
            table.append([entry["name"], direction, *cells, _ratio(found.get(OURS))])
    lines = _aligned(table) if rows else ["no workload was measured"]
    lines += [line for entry in entries for line in (*_layer_lines(entry), *_decoding_lines(entry), *_host_lines(entry))]
    lines += [f"{entry['name']}: {entry['message']}" for entry in entries if entry.get("message")]
    return "\n".join([*lines, *_reasons(rows), CONVENTION])


def _speed(row: Entry | None, workload: Entry) -> str:
    if row is None:
        return ""
    if row["timing"] is None:
        return "wrong" if row["failed"] and row["error_share"] is not None else "-"
    seconds = row["timing"]["median"]
    if workload["seqlen_q"] == 1:
        keys = workload["batch"] * (workload["kv_heads"] or workload["heads"]) * workload["seqlen_k"]
        itemsize = 4 if row["dtype"] == "fp32" else 2
        return f"{2 * keys * workload['head_dim'] * itemsize / seconds / 1e9:.0f}"
    return f"{row['flops_per_second'] / 1e12:.0f}" if row["flops_per_second"] >= 1e13 else f"{row['flops_per_second'] / 1e12:.2g}"


def _ratio(row: Entry | None) -> str:
    return "" if row is None or row["over_rival"] is None else f"{row['over_rival']:.2f}"


def _aligned(table: Iterable[Sequence[str]]) -> list[str]:
    rows = list(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if at < 2 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]


def _layer_lines(entry: Entry) -> list[str]:
    """Time and memory of a training step; the last column is the least of the others over ours."""
    found: dict[str, Entry] | None = entry.get("layer_steps")
    if found is None:
        return []
    table = [[f"{entry['name']}, a training step", "", *("ours" if name == OURS else name for name in found), "x"]]
    for title, key, unit in (("milliseconds", "milliseconds", 1.0), ("MiB at most", "extra_bytes", 2.0**20)):
        others = [facts[key] for name, facts in found.items() if name != OURS and key in facts]
        ratio = f"{min(others) / found[OURS][key]:.2f}" if others else ""
        cells = [f"{facts[key] / unit:.3g}" if key in facts else "-" for facts in found.values()]
        table.append(["", title, *cells, ratio])
    return [*_aligned(table), *(f"{name}: {facts['reason']} ({entry['name']})" for name, facts in found.items() if "reason" in facts)]


def _decoding_lines(entry: Entry) -> list[str]:
    """A step over each cache, and its part of what a copy of as many bytes reached in turns with it."""
    found: dict[str, Entry] | None = entry.get("decoding_steps")
    if found is None:
        return []
    table = [[f"{entry['name']}, keys", entry["shape"], *found]]
    table.append(["", "microseconds", *(f"{facts['microseconds']:.1f}" for facts in found.values())])
    table.append(["", "GB/s of k and v", *(f"{facts['bytes_per_second'] / 1e9:.0f}" for facts in found.values())])
    table.append(["", "of a copy's", *(f"{facts['copy_share']:.0%}" for facts in found.values())])
    return _aligned(table)


def _host_lines(entry: Entry) -> list[str]:
    found = entry.get("host_microseconds")
    if found is None:
        return []
    table = [["host microseconds a call", "", *("ours" if name == OURS else name for name in found)]]
    for title, key in (("forward, no gradients", "inference"), ("forward and backward", "training")):
        table.append(["", title, *("-" if times is None else f"{times[key]:.0f}" for times in found.values())])
    return _aligned(table)


def _reasons(entries: Sequence[Entry]) -> list[str]:
    """Each sentence once, with the workloads that met it; wrong results in full."""
    met: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for row in entry["rows"]:
            if row["timing"] is None and row["reason"] is not None:
                names = met.setdefault((row["contender"], row["reason"][:160]), [])
                names += [entry["name"]] if entry["name"] not in names else []
    return [
        f"{contender}: {reason} ({', '.join(names) if len(names) < 4 else f'{len(names)} workloads'})"
        for (contender, reason), names in met.items()
    ]


if __name__ == "__main__":
    print(report(ended(Path(sys.argv[1]))))
