"""What every CUDA kernel costs in machine code, held to theory and to what it cost before. From the root of the checkout:

    python -m tests.codegen.cuda_ledger                        compile everything; a row that got worse, or is unknown, fails
    python -m tests.codegen.cuda_ledger --architecture sm_80   only this one; may be repeated
    python -m tests.codegen.cuda_ledger --update               compile and write cuda_ledger.json, of the nvcc on PATH

A ledger rewritten is a difference for a reader to judge. Of a release of nvcc that it does not know, rows are held to theory, to the shared
memory of a block, and to the most spills that any release had of the same kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from . import cuda_code, cuda_theory
from .cuda_code import TYPES, Cost

LEDGER = Path(__file__).with_name("cuda_ledger.json")
UPDATE = "python -m tests.codegen.cuda_ledger --update"
ARCHITECTURES = tuple(cuda_code.KILOBYTES)
MOST_SHARED = 99 * 1024  # bytes that a block may have on every architecture
WORSE_ABOVE = {
    "stack": "bytes of stack", "spills": "loads and stores of a thread's own memory", "loop_spills": "of them inside a loop",
    "shared": "bytes of shared memory",
}  # fmt: skip
SPILLS = {column: meaning for column, meaning in WORSE_ABOVE.items() if "spills" in column}

Rows = dict[str, Cost]  # by "architecture kernel"
Ledger = dict[str, Rows]  # by the version of nvcc


def read() -> Ledger:
    if not LEDGER.exists():
        return {}
    text = json.loads(LEDGER.read_text())
    return {
        version: {name: Cost(**dict(zip(text["columns"], numbers, strict=True))) for name, numbers in rows.items()}
        for version, rows in text["nvcc"].items()
    }


def write(ledger: Ledger) -> None:
    versions = []
    for version, rows in sorted(ledger.items()):
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(list(rows[name]))}" for name in sorted(rows))
        versions.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
    body = ",\n".join(versions)
    LEDGER.write_text(f'{{"columns": {json.dumps(Cost._fields)},\n"nvcc": {{\n{body}\n}}}}\n')


def complaints(name: str, new: Cost, known: Cost | None, same_release: bool = True) -> Iterator[str]:
    """What is wrong with a row, in sentences. known: the same release's row, or the most that other releases had of each number."""
    theory = cuda_theory.expected(name.split(" ", 1)[1])
    if theory is not None:
        for column, number in theory._asdict().items():
            if number is not None and getattr(new, column) != number:
                taken = f"{getattr(new, column)} {column}, and its tile takes {number}"
                yield f"{name}: {taken}; mend the kernel, or what cuda_theory.py says of it"
    if new.shared > MOST_SHARED:
        yield f"{name}: {new.shared} bytes of shared memory, and a block has {MOST_SHARED}: it cannot be launched everywhere"
    if known is None:
        yield f"{name}: the ledger has no such row; record it with {UPDATE}"
        return
    for column, meaning in WORSE_ABOVE.items() if same_release else SPILLS.items():
        now, before = getattr(new, column), getattr(known, column)
        if now > before:
            yield f"{name}: {now} {meaning}, before {before}; mend the kernel, or accept it with {UPDATE}"
    if not same_release:
        return
    if new.blocks < known.blocks:
        yield f"{name}: {new.blocks} blocks at once on a multiprocessor, before {known.blocks}; mend the kernel, or accept it with {UPDATE}"
    for column in ("threads", *cuda_theory.Counts._fields):
        now, before = getattr(new, column), getattr(known, column)
        if now != before:
            yield f"{name}: {now} {column}, before {before}; if that is meant, record it with {UPDATE}"


def most(ledger: Ledger) -> Rows:
    """Of each kernel the most that any release had of each number."""
    names = {name for rows in ledger.values() for name in rows}
    return {name: Cost(*map(max, zip(*(rows[name] for rows in ledger.values() if name in rows), strict=True))) for name in names}


def judged(rows: Rows, known: Rows, whole: bool, same_release: bool = True) -> list[str]:
    """The complaints about rows; of a whole architecture none may be gone."""
    bad = [sentence for name, row in rows.items() for sentence in complaints(name, row, known.get(name), same_release)]
    compiled = {name.split()[0] for name in rows}
    gone = [name for name in known if whole and name.split()[0] in compiled and name not in rows]
    return bad + [f"{name}: no such kernel is compiled any more; drop it with {UPDATE}" for name in gone]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--update", action="store_true", help="write the ledger")
    options.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="only this one; may be repeated")
    options.add_argument("--type", action="append", choices=TYPES, help="only the kernels of this source; may be repeated")
    given = options.parse_args()

    absent = cuda_code.missing()
    if absent:
        print(f"NOTHING WAS CHECKED: the CUDA kernels can't be compiled here: {absent}", file=sys.stderr)
        return 0
    version, types = cuda_code.nvcc_version(), tuple(given.type or TYPES)
    rows = {
        f"{architecture} {name}": cost
        for architecture in given.architecture or ARCHITECTURES
        for name, cost in cuda_code.costs(architecture, types).items()
    }
    ledger = read()
    if given.update:
        known, compiled = ledger.get(version, {}), {name.split()[0] for name in rows}
        kept = {name: row for name, row in known.items() if given.type or name.split()[0] not in compiled}
        ledger |= {version: kept | rows}
        write(ledger)
    bad, against = verdict(ledger, version, rows, whole=given.type is None)
    print("\n".join([*bad, f"nvcc {version}: {len(rows)} kernels, {len(bad)} complaints{against}"]))
    return 1 if bad else 0


def verdict(ledger: Ledger, version: str, rows: Rows, whole: bool) -> tuple[list[str], str]:
    """The complaints, and against what rows of an unknown release were held."""
    if version in ledger:
        return judged(rows, ledger[version], whole), ""
    against = f"; the ledger knows nvcc {', '.join(ledger) or 'of no release'}, so they were held to theory and to its most spills alone"
    return judged(rows, most(ledger), whole, same_release=False), against


if __name__ == "__main__":
    sys.exit(main())
