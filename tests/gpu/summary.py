"""What a run found, read from the records its processes left: a line a step, every failure, every reason to skip."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Step

MOST_FAILURES, MESSAGE_WIDTH = 40, 200
HEADINGS = ("step", "", "passed", "failed", "skipped", "left out", "seconds", "bound used")


@dataclass(frozen=True)
class StepResult:
    """failures: a sentence each, what began and never ended among them; skipped: how often by reason."""

    name: str
    title: str
    seconds: float
    passed: int
    failures: tuple[str, ...]
    skipped: dict[str, int]
    left_out: int
    used: float | None
    nearest: str  # to its bound
    entries: tuple[dict[str, Any], ...]

    @property
    def wrong(self) -> bool:
        """A step of which nothing passed is as wrong as one that failed, unless each of its tests says why it was skipped."""
        return bool(self.failures) or not (self.passed or self.skipped)

    @property
    def cells(self) -> tuple[str, ...]:
        counts = (self.passed, len(self.failures), sum(self.skipped.values()), self.left_out)
        used = "" if self.used is None else f"{self.used:.0%} ({self.nearest})"
        return self.name, self.title, *map(str, counts), f"{self.seconds:.0f}", used

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "name"}


def result_of(step: Step, work: Path, seconds: float) -> StepResult:
    entries, failures = [], []
    records = sorted((work / "records" / step.name).glob("*.jsonl"))
    for record in records:
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        ended = {line["name"]: line for line in lines if line["event"] == "ended"}
        entries += list(ended.values())
        failures += [f"{_short(name)}: {_message(line)}" for name, line in ended.items() if line["outcome"] == "failed"]
        lost = [line["name"] for line in lines if line["event"] == "began" and line["name"] not in ended]
        failures += [f"{_short(name)}: began and never ended: it crashed, hung, lost the device or met the limit" for name in lost]
    if not entries and not failures:
        failures.append(f"nothing was done: {_last_line(work / 'logs' / f'{step.name}-0.log')}")
    used = {entry["name"]: entry["facts"]["used"] for entry in entries if "used" in entry.get("facts", {})}
    nearest = max(used, key=lambda name: used[name], default="")
    return StepResult(
        name=step.name,
        title=step.title,
        seconds=round(seconds, 1),
        passed=sum(entry["outcome"] == "passed" for entry in entries),
        failures=tuple(failures),
        skipped=dict(Counter(entry["message"] for entry in entries if entry["outcome"] == "skipped")),
        left_out=sum(entry["outcome"] == "left out" for entry in entries),
        used=used.get(nearest),
        nearest=_short(nearest),
        entries=tuple(entries),
    )


def _short(name: str) -> str:
    """tests/gpu/test_gpu_x.py::test_y[z] -> test_y[z]"""
    return name.rpartition("::")[2]


def _message(line: dict[str, Any]) -> str:
    wrong_rows = [f"{row['contender']} {row['direction']}: {row['reason']}" for row in line.get("rows", []) if row["failed"]]
    return str(line.get("message") or "; ".join(wrong_rows))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "its log is empty"


def printed(results: list[StepResult], machine: dict[str, Any]) -> str:
    """The table of the steps, then failures and reasons to skip."""
    rows = [HEADINGS, *(result.cells for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["", described(machine)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failures = [f"{result.name}: {failure}" for result in results for failure in result.failures]
    lines += [" ".join(failure.split())[:MESSAGE_WIDTH] for failure in failures[:MOST_FAILURES]]
    if len(failures) > MOST_FAILURES:
        lines.append(f"and {len(failures) - MOST_FAILURES} more failures, all in the JSON")
    lines += [f"{result.name}: skipped {count}: {reason}" for result in results for reason, count in result.skipped.items()]
    wrong = [result.name for result in results if result.wrong]
    unjudged = [result.name for result in results if not (result.passed or result.wrong)]
    if unjudged:
        lines.append(f"nothing was judged by: {', '.join(unjudged)}")
    return "\n".join([*lines, f"wrong: {', '.join(wrong)}" if wrong else "every step held" if not unjudged else "every other step held"])


def described(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if name in ("torch", "triton"))
    gpu = machine.get("gpu")
    if not gpu:
        return f"a rehearsal on {machine['cpu']}, {packages}"
    peaks = f"{gpu['best_gemm']['bf16'] / 1e12:.0f} TFLOP/s of a bf16 product, {gpu['copy_bandwidth'] / 1e12:.2f} TB/s of a copy"
    smi = gpu["nvidia_smi"]
    driver = smi.get("driver_version", "unknown") if isinstance(smi, dict) else "unknown"
    return f"{gpu['name']}, driver {driver}, {packages}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}; measured: {peaks}"


def folder_name(machine: dict[str, Any]) -> str:
    """nvidia-h200, of "NVIDIA H200"."""
    gpu = machine.get("gpu")
    return re.sub(r"[^a-z0-9]+", "-", str(gpu["name"] if gpu else "rehearsal").lower()).strip("-")
