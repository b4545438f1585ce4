"""`fused-attention compare before.json after.json`: what became slower, where both files were measured alike.

change = after / before - 1;   noise = the two interquartile ranges together, over before;   slower iff change > max(limit, noise)
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import differences

SCHEMA = 1
Key = tuple[str, ...]
KEY = ("workload", "kind", "dtype", "direction", "contender")


@dataclass(frozen=True)
class Change:
    """One row of both files; change and noise are shares of the time before."""

    key: Key
    ours: bool
    before: float | None  # seconds; None: the row has no speed there
    after: float | None
    noise: float

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after / self.before - 1.0

    def slower_than(self, limit: float) -> bool:
        return self.change is not None and self.change > max(limit, self.noise)

    @property
    def lost(self) -> bool:
        """It had a speed and has none: its gate failed, or it can't run any more."""
        return self.before is not None and self.after is None

    def describe(self, limit: float | None) -> str:
        name = " ".join(self.key)
        if self.change is None:
            return f"{name}: {'lost its speed' if self.lost else 'has no speed to compare with'}"
        inside = abs(self.change) <= self.noise
        verdict = "inside the noise" if inside else "slower" if self.change > 0 else "faster"
        if limit is not None and self.ours and self.slower_than(limit):
            verdict = f"slower than the limit of {limit:.1%}"
        times = f"{(self.before or 0.0) * 1e3:.3g} ms -> {(self.after or 0.0) * 1e3:.3g} ms"
        return f"{name}: {times}, {self.change:+.1%} (noise {self.noise:.1%}): {verdict}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="JSON of an earlier run of bench")
    parser.add_argument("after", type=Path, help="JSON of a later run")
    parser.add_argument(
        "--fail-if-slower", type=_percent, metavar="PERCENT", help="exit status 1 if a row of ours slows by more, such as 3%%"
    )
    parser.add_argument("--all", action="store_true", help="also list the rivals' rows")


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a percentage such as 3%") from None
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a percentage of at least 0")
    return value


def run(args: argparse.Namespace) -> int:
    """0; 1 if a row of ours became slower than allowed or lost its speed; 2 if the files can't be compared."""
    try:
        before, after = load(args.before), load(args.after)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    apart = differences(before["environment"], after["environment"])
    if apart:
        print(f"{args.before} and {args.after} were not measured alike, so their speeds can't be compared:", file=sys.stderr)
        for sentence in apart:
            print(f"  {sentence}", file=sys.stderr)
        return 2
    changes = compare(before, after)
    shown = [change for change in changes if change.ours or args.all]
    if not any(change.ours for change in changes):
        print("the files have no row of ours in common", file=sys.stderr)
        return 2
    for change in shown:
        print(change.describe(args.fail_if_slower))
    alone = len(_rows(before)) - len(changes)
    if alone:
        print(f"{alone} rows of {args.before} are not in {args.after}, or measure other work there")
    if args.fail_if_slower is None:
        return 0
    worse = [change for change in changes if change.ours and (change.lost or change.slower_than(args.fail_if_slower))]
    print(f"{len(worse)} of {sum(change.ours for change in changes)} rows of ours are slower than the limit or lost their speed")
    return 1 if worse else 0


def load(path: Path) -> dict[str, Any]:
    """A result of bench, or a ValueError that says what is wrong with the file."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not {"environment", "rows", "sweep"} <= content.keys():
        found = content.get("schema") if isinstance(content, dict) else None
        raise ValueError(f"{path} has schema {found!r}, expected {SCHEMA}: give a file that `fused-attention bench --json` wrote")
    return content


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """A change for every row that both files have, of the same work: a workload may change its shape and keep its name."""
    earlier, later = (_rows(content) for content in (before, after))
    return [_change(key, row, later[key]) for key, row in earlier.items() if key in later and row["flops"] == later[key]["flops"]]


def _rows(content: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {tuple(row[name] for name in KEY): row for row in (*content["rows"], *content["sweep"])}


def _change(key: Key, before: dict[str, Any], after: dict[str, Any]) -> Change:
    first, second = before["timing"], after["timing"]
    if first is None or second is None:
        return Change(key, before["ours"], first and first["median"], second and second["median"], 0.0)
    spread = sum(timing["upper_quartile"] - timing["lower_quartile"] for timing in (first, second))
    return Change(key, before["ours"], first["median"], second["median"], spread / first["median"])
