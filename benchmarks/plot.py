"""Speed over sequence length, drawn: ours, torch's fused function and the naive form, forward and backward, causal and full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from .contenders import NAIVE, OURS, contenders
from .environment import one_line
from .measure import Row, measure
from .timing import Protocol
from .workloads import Direction, Workload

LENGTHS = (128, 256, 512, 1024, 2048)
QUICK_LENGTHS = (128, 256, 512)
TOKENS, HEADS, HEAD_DIM = 2048, 4, 64  # every length has the same number of tokens
INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
LOOKS: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0b6e99", "marker": "o", "linewidth": 2.6, "markersize": 6.5, "zorder": 4},
    "torch SDPA": {"color": "#d9822b", "marker": "s", "linewidth": 1.8, "markersize": 5.5, "zorder": 3},
    NAIVE: {"color": "#9aa5b1", "marker": "^", "linewidth": 1.8, "markersize": 5.5, "zorder": 2},
}
LABELS = {OURS: "fused-attention", "torch SDPA": "torch SDPA", NAIVE: "naive: matmul, softmax, matmul"}
PANELS: tuple[tuple[str, bool], ...] = (("causal", True), ("full", False))


def sweep_workloads(lengths: Sequence[int]) -> list[Workload]:
    return [
        Workload(f"sweep-{name}-{seqlen}", f"{name} {seqlen}", max(1, TOKENS // seqlen), HEADS, seqlen, seqlen, HEAD_DIM, causal=causal)
        for name, causal in PANELS
        for seqlen in lengths
    ]


def sweep(lengths: Sequence[int], protocol: Protocol, seed: int, say: Callable[[str], None] = lambda step: None) -> list[Row]:
    """The rows behind the plot, judged like all others."""
    rows: list[Row] = []
    for workload in sweep_workloads(lengths):
        say(workload.title)
        rows += measure(workload, "attention", ("fp32", torch.float32), contenders("attention"), protocol, seed)
    return rows


def draw(rows: Sequence[Row], environment: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a column a direction, a row a visibility, GFLOP/s over seqlen, the best matrix product as a line."""
    figure = Figure(figsize=(10.5, 8.0), dpi=150, facecolor="white")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    directions: tuple[Direction, ...] = ("forward", "backward")
    for line, (name, _) in enumerate(PANELS):
        for column, direction in enumerate(directions):
            panel = [row for row in rows if row.workload.startswith(f"sweep-{name}-") and row.direction == direction]
            _draw_panel(axes[line][column], panel, f"{direction}, {name}", environment["best_gemm"].get("fp32"))
    for axis in axes[-1]:
        axis.set_xlabel("sequence length (queries = keys)", color=INK)
    for line in axes:
        line[0].set_ylabel("GFLOP/s over visible pairs", color=INK)
    _write_around(figure, axes[0][0], environment)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axis: Axes, rows: Sequence[Row], title: str, best_gemm: float | None) -> None:
    lengths = sorted({_length(row) for row in rows})
    for name, look in LOOKS.items():
        points = sorted((_length(row), row) for row in rows if row.contender == name and row.flops_per_second is not None)
        if points:
            axis.plot([x for x, _ in points], [(row.flops_per_second or 0.0) / 1e9 for _, row in points], label=LABELS[name], **look)
    if best_gemm is not None:
        dashes: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1}
        axis.axhline(best_gemm / 1e9, label="best matrix product here", **dashes)
    axis.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_major_formatter(FixedFormatter([str(length) for length in lengths]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0.0, top=None if best_gemm is None else 1.1 * best_gemm / 1e9)
    axis.grid(axis="y", color=GRID, linewidth=1.0)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def _length(row: Row) -> int:
    return int(row.workload.rsplit("-", 1)[1])


def _write_around(figure: Figure, first: Axes, environment: dict[str, Any]) -> None:
    """Title, conditions and legend, all outside the data."""
    left = 0.075
    figure.subplots_adjust(left=left, right=0.975, top=0.80, bottom=0.075, wspace=0.07, hspace=0.16)
    figure.text(left, 0.955, "Attention speed over sequence length, fp32", fontsize=16, fontweight="bold", color=INK)
    shape = f"{HEADS} heads, head_dim {HEAD_DIM}, batch × seqlen = {TOKENS} tokens; medians, higher is faster"
    figure.text(left, 0.925, shape, fontsize=10, color=MUTED)
    figure.text(left, 0.901, one_line(environment), fontsize=10, color=MUTED)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(left - 0.012, 0.888), ncols=len(labels), frameon=False, fontsize=10,
        labelcolor=INK, handlelength=2.2, columnspacing=2.0,
    )  # fmt: skip
