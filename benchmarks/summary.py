"""A results file as the README's table: how many times faster than the best rival, workload by workload.

python -m fused_attention.benchmarks.summary benchmarks/results/cpu-zen5-2core/bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(path: Path) -> str:
    """A Markdown table of our own rows: GFLOP/s, and the time of the best rival and of the naive form over ours."""
    results = json.loads(path.read_text())
    rows = [row for row in results["rows"] if row["ours"] and not row["failed"]]
    lines = ["| workload | | GFLOP/s forward, backward | × best rival | × naive |", "|---|---|---|---|---|"]
    for name, kind, dtype in dict.fromkeys((row["workload"], row["kind"], row["dtype"]) for row in rows):
        found = [row for row in rows if (row["workload"], row["kind"], row["dtype"]) == (name, kind, dtype)]
        columns = [_pair(found, "flops_per_second", 1e-9, 0), _pair(found, "over_rival", 1, 2), _pair(found, "over_naive", 1, 2)]
        lines.append(f"| {results['workloads'][name]['title']} | {kind}, {dtype} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _pair(rows: list[dict[str, Any]], key: str, factor: float, digits: int) -> str:
    """Forward and backward, a dash for what has none."""
    by_direction = {row["direction"]: row[key] for row in rows}
    found = (by_direction.get(direction) for direction in ("forward", "backward"))
    return ", ".join("–" if number is None else f"{number * factor:.{digits}f}" for number in found)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
