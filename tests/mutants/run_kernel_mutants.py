"""Plants every fault of kernel_faults.py in a copy of the Triton kernels and asks kernel_suite.py whether it notices.

    TRITON_INTERPRET=1 python -m tests.mutants.run_kernel_mutants [NAME...]        exit status 1 if the suite is too weak

Importing torch and computing truths takes longer than most checks, so it is done once, and each copy runs in a fork of this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") != "1":
    sys.exit("Triton interprets kernels only where TRITON_INTERPRET=1 is set before its import: put it before this command")

from . import kernel_suite
from .kernel_faults import FAULTS, SURVIVORS, Fault

ROOT = Path(__file__).parents[2]
SOURCES = {"triton_kernels": ROOT / "triton_kernels", "triton_backend.py": ROOT / "python" / "fused_attention" / "triton_backend.py"}
CLEAN = "none"  # the kernels as they are
ENOUGH = 0.95


def misplaced(fault: Fault, sources: Path) -> str | None:
    """Why a fault can't be planted."""
    count = (sources / fault.file).read_text().count(fault.old)
    return None if count == 1 else f"{fault.file} holds it {count} times, not once: {fault.old!r}"


def copy_sources(folder: Path) -> Path:
    """The kernels as they are now; every fault is planted in this state, whatever becomes of the checkout meanwhile."""
    shutil.copytree(SOURCES["triton_kernels"], folder / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCES["triton_backend.py"], folder)
    return folder


def plant(fault: Fault, sources: Path, folder: Path) -> None:
    shutil.copytree(sources, folder)
    path = folder / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))


def verdicts(names: list[str], jobs: int) -> Iterator[tuple[str, str | None, float]]:
    """Of every fault, and of none: what noticed it, and after how many seconds; in the order in which they end."""
    with tempfile.TemporaryDirectory() as root:
        sources = copy_sources(Path(root).resolve() / CLEAN)
        waiting, running = [CLEAN, *names], dict[int, tuple[str, int, float]]()
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                if name != CLEAN:
                    reason = misplaced(FAULTS[name], sources)
                    if reason is not None:
                        yield name, f"MISPLACED: {reason}", 0.0
                        continue
                    plant(FAULTS[name], sources, sources.parent / name)
                process, pipe = fork(str(sources.parent / name), units_for(name, names))
                running[process] = name, pipe, time.monotonic()
            if not running:
                continue
            process, _ = os.wait()
            name, pipe, started = running.pop(process)
            with os.fdopen(pipe) as answer:
                text = answer.read()
            yield name, json.loads(text) if text else "the process died", time.monotonic() - started


def units_for(name: str, names: list[str]) -> list[str]:
    """For a fault what notices it, then all others. The kernels as they are have to pass what is going to judge the faults."""
    if name == CLEAN and len(names) < len(FAULTS):
        return list(dict.fromkeys(FAULTS[other].noticed_by for other in names))
    return sorted(kernel_suite.units, key=lambda unit: name == CLEAN or unit != FAULTS[name].noticed_by)  # a stable sort


def fork(copy: str, names: list[str]) -> tuple[int, int]:
    """The process that judges a copy, and where it answers."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    answer = kernel_suite.first_failure(copy, names)
    with os.fdopen(writer, "w") as pipe:
        json.dump(None if answer is None else answer[:2000], pipe)
    os._exit(0)


def complaint(name: str, verdict: str | None) -> str | None:
    """What is wrong with the suite or with the data, or None."""
    if name == CLEAN:
        return None if verdict is None else f"the kernels themselves fail: {verdict}"
    if verdict is None:
        return None if name in SURVIVORS else f"{name} is not noticed: {FAULTS[name]}"
    if verdict.startswith("MISPLACED"):
        return f"{name}: {verdict}"
    for error in ("SyntaxError", "ImportError", "NameError", "UnboundLocalError"):
        if error in verdict:
            return f"{name} is no fault of arithmetic: {verdict}"
    return f"{name} is noticed after all, so this is no reason to survive: {verdict}" if name in SURVIVORS else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", action="store_true", help="print {name: what noticed it, or null} alone")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(FAULTS)
    if unknown:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    names = arguments.names or list(FAULTS)
    kernel_suite.prepare()
    found: dict[str, str | None] = {}
    started = time.monotonic()
    for name, verdict, seconds in verdicts(names, arguments.jobs):
        found[name] = verdict
        if not arguments.json:
            print(f"{seconds:6.1f} s  {name}: {(verdict or 'nothing').splitlines()[0][:150]}", flush=True)
    if arguments.json:
        print(json.dumps(found))
        return 0
    complaints = [text for name, verdict in found.items() if (text := complaint(name, verdict))]
    noticed = sum(found[name] is not None for name in names)
    print(*complaints, sep="\n")
    for name in names:
        if found[name] is None:
            print(f"survives: {name}: {SURVIVORS.get(name, 'no reason known')}")
    print(f"{noticed} of {len(names)} faults noticed ({noticed / len(names):.1%}), {time.monotonic() - started:.0f} s")
    return int(bool(complaints) or noticed < ENOUGH * len(names))


if __name__ == "__main__":
    raise SystemExit(main())
