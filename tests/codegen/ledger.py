"""What every compiled kernel costs, held to what it cost before. From the root of the checkout:

    python -m tests.codegen.ledger            compile everything; a row that got worse, or that the ledger does not know, fails
    python -m tests.codegen.ledger --default  only what every test run compiles
    python -m tests.codegen.ledger --update   compile and write ledger.json

A ledger rewritten is a difference for a reader to judge.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import triton

from . import build, points, record, source
from .build import TENSOR_MEMORY
from .points import Point
from .record import Launch

COUNTED = {"spills": "local loads and stores", "loop_spills": "local loads and stores in a loop", "shared": "bytes of shared memory"}
LEDGER = Path(__file__).with_name("ledger.json")
UPDATE = "python -m tests.codegen.ledger --update"


class Row(NamedTuple):
    """A kernel at a point, under one version of Triton."""

    tile: str
    costs: dict[str, int]  # build.Cost by name


Measure = Callable[[Launch, str], build.Cost]  # of a launch on an architecture
Rows = dict[str, dict[str, Row]]  # by "point kernel", then by version of Triton


def read(path: Path = LEDGER) -> Rows:
    text = json.loads(path.read_text()) if path.exists() else {"columns": [], "rows": {}}
    return {
        name: {version: Row(tile, dict(zip(text["columns"], costs, strict=True))) for version, (tile, *costs) in versions.items()}
        for name, versions in text["rows"].items()
    }


def write(rows: Rows, path: Path = LEDGER) -> None:
    columns = next(list(row.costs) for versions in rows.values() for row in versions.values())
    lines = [
        f"{json.dumps(name)}: {json.dumps({version: [row.tile, *row.costs.values()] for version, row in sorted(rows[name].items())})}"
        for name in sorted(rows)
    ]
    body = ",\n".join(lines)
    path.write_text(f'{{"columns": {json.dumps(columns)},\n"rows": {{\n{body}\n}}}}\n')


def complaints(name: str, new: Row, known: Row | None, limit: int) -> Iterator[str]:
    """What is wrong with a row, in sentences."""
    yield from misfits(name, new, limit)
    now = new.costs
    if now["atomics"]:
        yield f"{name}: {now['atomics']} atomics, whose order is not fixed: results would differ from run to run"
    if known is None:
        yield f"{name}: the ledger has no such row; record it with {UPDATE}"
        return
    if new.tile != known.tile:
        yield f"{name}: tile {new.tile}, in the ledger {known.tile}; record it with {UPDATE}"
    for column, meaning in COUNTED.items():
        if now[column] > known.costs[column]:
            yield f"{name}: {now[column]} {meaning}, before {known.costs[column]}; mend the kernel, or accept it with {UPDATE}"
    if now["serialized"] > known.costs["serialized"]:
        yield f"{name}: ptxas serializes its wgmma, and did not before; mend the kernel, or accept it with {UPDATE}"
    if known.costs["products"] and not now["products"]:
        yield f"{name}: no products on tensor cores, before {known.costs['products']}"


def misfits(name: str, row: Row, limit: int) -> Iterator[str]:
    """Why a kernel cannot be launched at all."""
    if row.costs["shared"] > limit:
        yield f"{name}: {row.costs['shared']} bytes of shared memory with tile {row.tile}, and a block has {limit}: it cannot be launched"
    if row.costs["tensor_memory"] > TENSOR_MEMORY:
        columns = f"{row.costs['tensor_memory']} columns of tensor memory with tile {row.tile}"
        yield f"{name}: {columns}, and there are {TENSOR_MEMORY}: it cannot be launched"


def kernels(points: Iterable[Point]) -> Iterator[tuple[str, str, Launch]]:
    """The name of each row, its architecture and the launch; a call that launches a kernel in two ways gives two rows."""
    for point in points:
        ways: dict[str, list[Launch]] = {}
        for launch in record.launches(point.architecture, point.call):
            known = ways.setdefault(launch.name, [])
            if launch not in known:
                known.append(launch)
                yield f"{point} {launch.name}{len(known) if len(known) > 1 else ''}", point.architecture, launch


def compile_all(kernels: Iterable[tuple[str, str, Launch]], jobs: int, measure: Measure = build.cost) -> Iterator[tuple[str, Row | str]]:
    """Each kernel's row, or why there is none; each in a child of its own, for a compiler that aborts takes its process along."""
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, architecture, launch) in enumerate(kernels):
            if len(running) == jobs:
                yield finished(running)
            result = Path(folder, str(number))
            child = os.fork()
            if child == 0:
                compile_one(launch, architecture, result, measure)
            running[child] = name, result
        while running:
            yield finished(running)


def compile_one(launch: Launch, architecture: str, result: Path, measure: Measure) -> NoReturn:
    """Compile, leave a row or a sentence in a file, and end this process."""
    os.environ["TRITON_CACHE_DIR"] = str(result.with_suffix(".cache"))
    try:
        row: list[object] | str = [tile_of(launch.options), measure(launch, architecture)._asdict()]
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
        row = f"{type(error).__name__}: {error}"
    result.write_text(json.dumps(row))
    os._exit(0)


def finished(running: dict[int, tuple[str, Path]]) -> tuple[str, Row | str]:
    child, status = os.wait()
    name, result = running.pop(child)
    if status != 0:
        return name, f"the compiler ended its process with status {status}"
    row = json.loads(result.read_text())
    return name, row if isinstance(row, str) else Row(*row)


def tile_of(options: dict[str, object]) -> str:
    sizes = "x".join(str(options[side]) for side in ("BLOCK_M", "BLOCK_N", "ROWS", "BLOCK") if side in options)
    return f"{sizes} w{options['num_warps']} s{options['num_stages']}".strip()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--default", action="store_true", help="only what every test run compiles")
    options.add_argument("--update", action="store_true", help="write the ledger")
    options.add_argument("--architecture", action="append", help="only this one, such as sm_90; may be repeated")
    options.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    given = options.parse_args()

    source.find()
    chosen = points.default_points() if given.default else points.points()
    wanted = [point for point in chosen if given.architecture is None or point.architecture in given.architecture]
    ledger, fresh, bad = read(), {}, []
    for name, row in compile_all(kernels(wanted), given.jobs):
        if isinstance(row, str):
            bad.append(f"{name}: {row}")
            continue
        fresh[name] = row
        known = row if given.update else ledger.get(name, {}).get(triton.__version__)
        bad += complaints(f"triton {triton.__version__} {name}", row, known, build.SHARED_LIMITS[name.split()[0]])
    whole = not given.default and given.architecture is None
    gone = [name for name in ledger if whole and name not in fresh and triton.__version__ in ledger[name]]
    if given.update:
        for name in gone:
            del ledger[name][triton.__version__]
        for name, row in fresh.items():
            ledger.setdefault(name, {})[triton.__version__] = row
        write({name: versions for name, versions in ledger.items() if versions})
    else:
        bad += [f"triton {triton.__version__} {name}: in the ledger, and no longer compiled; drop it with {UPDATE}" for name in gone]
    print("\n".join([*bad, f"triton {triton.__version__}: {len(fresh)} kernels compiled, {len(bad)} complaints"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
