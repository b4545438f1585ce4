"""The least time a kernel for sm_90 can take on an H200, from the instructions of its main loops and the published limits of the machine.

    python -m tests.codegen.bound [--version 3.6.0] [--measured FILE]

    cycles of a unit = sum over visited tiles of the cycles a turn takes of it        (spread over the SMs)
    overlapped: the busiest unit, as if every unit always worked beside the others
    in turn:    first the products, their operands coming as they go, then the busiest unit of the softmax, as if the two never overlapped

A measured rate lies between the two, or the model is wrong. It knows no latency, no launch, and no code outside the main loops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from . import hopper, ledger
from .loops import SHARED_BYTES, Mix

SEQLENS = (2048, 4096, 8192, 16384, 32768)
ITEMSIZE = 2
WIDTH = 107  # of what stands before the speeds
SOFTMAX = ("mufu", "fma", "alu", "issue")  # the units that compute it; the rest feed the tensor cores or are them
# Of a visible pair, in multiples of head_dim: two a product. Backward counts the five products of its formula, whatever it computes twice.
FLOPS = {"forward": 4, "key_value": 8, "query": 6, "backward": 10}
# TFLOP/s of cuDNN 9.19.1 on an H200, bf16, batch 1, 64 heads, 8 key heads: cudnn-frontend, sdpa_benchmark_training/results.
CUDNN = {
    (128, True, "forward"): (484, 591, 644, 673, 688),
    (128, True, "backward"): (370, 474, 541, 579, 581),
    (128, False, "forward"): (633, 671, 691, 702, 693),
    (128, False, "backward"): (504, 560, 594, 612, 572),
}


class Machine(NamedTuple):
    """Published figures of an H200; its peak of 989 TFLOP/s is that of 1830 MHz."""

    multiprocessors: int = 132
    clock: float = 1.83e9
    memory: float = 4.8e12  # bytes a second
    l2: float = 5120.0  # bytes a cycle: NVIDIA's figure for the A100, the last it gave


class Shape(NamedTuple):
    head_dim: int
    causal: bool
    seqlen: int
    batch: int = 1
    heads: int = 64
    kv_heads: int = 8

    @property
    def pairs(self) -> int:
        """Visible ones, of all heads."""
        return self.batch * self.heads * (self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2)


class Kernel(NamedTuple):
    """A row of hopper.json: what a turn costs each warp, on a tile that is seen in full and on one that needs the mask."""

    name: str
    block_m: int
    block_n: int
    warps: int  # that share a turn
    full: Mix
    masked: Mix
    covered: tuple[int, int] = (0, 0)  # exponentials of a full tile that stand beside a product, of how many

    @property
    def by_keys(self) -> bool:
        """Whether a program owns keys and visits queries."""
        return self.name == "key_value"


class Bound(NamedTuple):
    """Seconds."""

    overlapped: float
    in_turn: float
    unit: str  # the busiest


def kernel_of(name: str, row: ledger.Row) -> Kernel:
    sizes, warps, _ = row.tile.split()
    block_m, block_n = map(int, sizes.split("x"))
    loops = [(Mix(*turn), tuple(covered)) for turn, covered in zip(row.costs["turns"], row.costs["covered"], strict=True)]
    (full, covered), *_, (masked, _) = sorted(loops, key=lambda loop: loop[0].issue) * (2 if len(loops) == 1 else 1)
    # A warp has 16 rows of a product; of a kernel whose groups of warps part ways the tile names those of one group.
    sharing = max(int(warps.removeprefix("w")), (block_n if name == "key_value" else block_m) // 16)
    return Kernel(name, block_m, block_n, sharing, full, masked, covered)


def programs(kernel: Kernel, shape: Shape) -> Iterator[tuple[int, int]]:
    """For each program of one head, how many tiles it visits that are seen in full, and how many that need the mask."""
    own, other = (kernel.block_n, kernel.block_m) if kernel.by_keys else (kernel.block_m, kernel.block_n)
    last = shape.seqlen
    for start in range(0, last, own):
        end = min(start + own, last)
        if not shape.causal:
            whole = kernel.by_keys or last % other == 0
            tiles = -(-last // other)
            yield (tiles, 0) if whole else (tiles - 1, 1)
        elif kernel.by_keys:
            first, full = start // other, -(-(end - 1) // other)
            yield -(-last // other) - full, full - first
        else:
            full, tiles = (start + 1) // other, -(-end // other)
            yield full, tiles - full


def cycles(kernel: Kernel, shape: Shape, machine: Machine, full: float, masked: float) -> dict[str, float]:
    """Of each unit of an SM, for so many tiles."""
    turns = kernel.warps / 4  # a warp on each quarter of an SM, one after the other
    found = {
        unit: turns * (full * seen + masked * hidden) for unit, seen, hidden in zip(Mix._fields, kernel.full, kernel.masked, strict=True)
    }
    copied = (full + masked) * 2 * shape.head_dim * ITEMSIZE * (kernel.block_m if kernel.by_keys else kernel.block_n)
    found["shared"] += copied / SHARED_BYTES
    found["l2"] = copied / (machine.l2 / machine.multiprocessors)
    return found


def bound(kernel: Kernel, shape: Shape, machine: Machine) -> Bound:
    """Of one kernel on one shape."""
    tiles = list(programs(kernel, shape))
    heads = shape.batch * (shape.kv_heads if kernel.by_keys else shape.heads)
    repeats = shape.heads // shape.kv_heads if kernel.by_keys else 1  # of its tiles, by a program that sums over a group's queries
    share = heads * repeats / machine.multiprocessors
    spread = cycles(kernel, shape, machine, *(share * sum(each) for each in zip(*tiles, strict=True)))
    alone = [cycles(kernel, shape, machine, *(repeats * count for count in each)) for each in tiles]
    found = {unit: max(spread[unit], *(program[unit] for program in alone)) / machine.clock for unit in spread}
    found["memory"] = traffic(kernel.name, shape) / machine.memory
    softmax = max(found[unit] for unit in SOFTMAX)
    products = max(seconds for unit, seconds in found.items() if unit not in SOFTMAX)
    return Bound(max(found.values()), products + softmax, max(found, key=lambda unit: found[unit]))


def traffic(name: str, shape: Shape) -> int:
    """Bytes that have to cross the memory bus: every tensor once."""
    rows, key_rows = shape.batch * shape.heads * shape.seqlen, shape.batch * shape.kv_heads * shape.seqlen
    tensors = {"forward": (2, 2), "key_value": (2, 4), "query": (3, 2)}[name]  # as long as q, as long as k
    return (tensors[0] * rows + tensors[1] * key_rows) * shape.head_dim * ITEMSIZE + 2 * 4 * rows


def rate(name: str, shape: Shape, seconds: float) -> float:
    """TFLOP/s."""
    return FLOPS[name] * shape.head_dim * shape.pairs / seconds / 1e12


def backward(parts: list[Bound]) -> Bound:
    """One pass after the other; delta, which memory alone bounds, is left out."""
    overlapped, in_turn, units = zip(*parts, strict=True)
    return Bound(sum(overlapped), sum(in_turn), units[overlapped.index(max(overlapped))])


def report(rows: ledger.Rows, version: str, machine: Machine, measured: Mapping[str, Mapping[str, float]]) -> str:
    heading = f"sm_90, triton {version}, {machine.clock / 1e6:.0f} MHz, {machine.multiprocessors} SMs, bf16, batch 1, heads 64/8"
    meaning = "a turn on a tile that is seen in full: cycles a warp takes of each unit, exponentials issued beside a product"
    lines = [heading, f"TFLOP/s, overlapped/in turn; {meaning}", ""]
    units = "".join(f"{unit:>8}" for unit in (*Mix._fields, "beside"))
    seqlens = "".join(f"{seqlen // 1024:>9}k" for seqlen in SEQLENS)
    for head_dim in hopper.HEAD_DIMS:
        for causal in (True, False):
            point = f"{hopper.ARCHITECTURE} bfloat16 {head_dim} {'causal' if causal else 'plain'} "
            lines.append(f"{f'{head_dim} ' + ('causal' if causal else 'full'):<39}{'tile':<14}{units}{seqlens}  busiest")
            found: dict[str, list[Bound]] = {}
            for name in sorted(name for name in rows if name.startswith(point) and version in rows[name]):
                title, row = name.removeprefix(point), rows[name][version]
                kernel = kernel_of(pass_of(title), row)
                found[title] = [bound(kernel, Shape(head_dim, causal, seqlen), machine) for seqlen in SEQLENS]
                turn = "".join(f"{cell:>8}" for cell in (*kernel.full, "{}/{}".format(*kernel.covered)))
                lines.append(line(f"{title:<37}{row.tile:<14}{turn}", kernel.name, found[title], head_dim, causal))
            both = [backward(list(parts)) for parts in zip(found["key_value"], found["query"], strict=True)]
            lines.append(line("key_value + query", "backward", both, head_dim, causal))
            lines += [
                speeds_line(f"cuDNN {name}, published", CUDNN[head_dim, causal, name])
                for name in ("forward", "backward")
                if (head_dim, causal, name) in CUDNN
            ]
            cells = [f"d{head_dim} {'causal' if causal else 'full'} {seqlen // 1024}k" for seqlen in SEQLENS]
            lines += [
                speeds_line(f"{name}, measured", [speeds.get(cell) for cell in cells])
                for name, speeds in measured.items()
                if speeds.keys() & set(cells)
            ]
            lines.append("")
    return "\n".join(lines)


def pass_of(name: str) -> str:
    """The pass that a row's kernel computes: an experiment is called after it as well."""
    return next(each for each in hopper.KERNELS if each in name)


def line(title: str, name: str, bounds: list[Bound], head_dim: int, causal: bool) -> str:
    cells = []
    for seqlen, each in zip(SEQLENS, bounds, strict=True):
        shape = Shape(head_dim, causal, seqlen)
        cells.append(f"{rate(name, shape, each.overlapped):.0f}/{rate(name, shape, each.in_turn):.0f}")
    return f"  {title:<{WIDTH}}" + "".join(f"{cell:>10}" for cell in cells) + f"  {bounds[-1].unit}"


def speeds_line(title: str, speeds: Sequence[float | None]) -> str:
    return f"  {title:<{WIDTH}}" + "".join(f"{'' if speed is None else round(speed):>10}" for speed in speeds)


def read_measured(path: Path | None) -> dict[str, dict[str, float]]:
    """TFLOP/s by contender and cell, from what the experiments wrote."""
    if path is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for cell in json.loads(path.read_text())["cells"]:
        for name, speed in cell["tflops"].items():
            found.setdefault(name, {})[cell["name"]] = speed
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--version", default=triton.__version__, help="of Triton, whose machine code counts")
    options.add_argument("--measured", type=Path, metavar="FILE", help="experiments.json of a GPU, to print beside the bounds")
    options.add_argument("--clock", type=float, default=Machine().clock, help="Hz that the GPU keeps under load")
    given = options.parse_args()
    print(report(ledger.read(hopper.LEDGER), given.version, Machine(clock=given.clock), read_measured(given.measured)))


if __name__ == "__main__":
    main()
