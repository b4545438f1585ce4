"""What the race of the experiments found: a line a cell, and what each variant makes of the plain kernel's time in the geometric mean."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fused_attention.benchmarks.workloads import Workload, attention_flops

from .grid import PLAIN


def finished(workload: Workload, name: str, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A cell: its shape, TFLOP/s by contender, the share of its bound that each variant used, and why others have none."""
    checked = {fact["checked"]: fact for fact in facts if "checked" in fact}
    milliseconds = next((fact["milliseconds"] for fact in facts if "milliseconds" in fact), {})
    reasons = {who: fact["reason"] for who, fact in checked.items() if fact["reason"] is not None}
    reasons |= {fact["lost"]: fact["reason"] for fact in facts if "lost" in fact}
    wrong = sorted(who for who, reason in reasons.items() if not reason.startswith("NotImplementedError"))
    reasons |= {fact["refused"]: fact["reason"] for fact in facts if "refused" in fact}
    flops = attention_flops(workload, "forward") * (2 if workload.backward else 1)  # of dk and dv four products, not two
    return {
        "name": name,
        "shape": workload.shape(),
        "milliseconds": milliseconds,
        "tflops": {who: flops / time / 1e9 for who, time in milliseconds.items()},
        "error_share": {who: fact["share"] for who, fact in checked.items() if fact["share"] is not None},
        "reasons": reasons,
        "wrong": wrong,
    }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """TFLOP/s, then each variant's time as a share of the plain kernel's; -: not timed, for the reason below."""
    names = list(dict.fromkeys(who for cell in cells for who in (*cell["error_share"], *cell["tflops"])))
    rows = [["TFLOP/s", *names, "best / cuDNN"]]
    for cell in cells:
        speeds = cell["tflops"]
        ours = [speed for who, speed in speeds.items() if who in cell["error_share"]]
        ratio = f"{max(ours) / speeds['cuDNN']:.2f}" if ours and "cuDNN" in speeds else ""
        rows.append([cell["name"], *(f"{speeds[who]:.3g}" if who in speeds else "-" for who in names), ratio])
    rows.append(["speed over the plain kernel's, geometric mean", *(_mean_ratio(cells, who) for who in names), ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(w) if at == 0 else text.rjust(w) for at, (text, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join([*lines, *(f"{cell['name']}: {who}: {reason}" for cell in cells for who, reason in cell["reasons"].items())])


def _mean_ratio(cells: Sequence[Mapping[str, Any]], who: str) -> str:
    both = [cell["tflops"] for cell in cells if who in cell["tflops"] and PLAIN in cell["tflops"]]
    return f"{statistics.geometric_mean(each[who] / each[PLAIN] for each in both):.2f}" if both else ""


def folder_name(environment: Mapping[str, Any]) -> str:
    """nvidia-h200, of "NVIDIA H200"."""
    gpu = environment.get("gpu")
    return re.sub(r"[^a-z0-9]+", "-", str(gpu["name"] if gpu else "rehearsal").lower()).strip("-")
