"""Are the faults in the CUDA sources noticed?  Each is compiled in a copy, for bfloat16 alone, and run in a process of its own.

python -m tests.simt.mutants [NAME ...]        exit status 1 where one is not
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .faults import FAULTS, Fault
from .problems import run_everything_once
from .simulation import ROOT, Simulation, compile_bindings, compile_simulation

SECONDS = 300  # of one fault, on a machine that does other things too
STUB = """#include "cuda/kernels.h"
int forward_float16(const AttentionParams&, Stream) { return 1; }
int backward_float16(const AttentionParams&, Stream) { return 1; }
int load_float16() { return 1; }
"""


def plant(fault: Fault | None, folder: Path) -> Path:
    """A copy of the sources with the fault, and without the kernels for float16."""
    sources: Path = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if fault is not None:
        path = sources / "cuda" / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.file} holds {text.count(fault.old)} times, not once: {fault.old}")
        path.write_text(text.replace(fault.old, fault.new))
    (sources / "cuda" / "float16.cu").write_text(STUB)
    return sources


def judge(library: Path) -> str | None:
    """What is noticed first, in a child process: a fault may end it, and one process would take two libraries' symbols for one."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_judge, args=(library, send))
    child.start()
    send.close()
    verdict: str | None
    try:
        verdict = receive.recv() if receive.poll(SECONDS) else f"nothing came within {SECONDS} seconds"
    except EOFError:
        verdict = "the process ended without a word"
    child.kill()
    child.join()
    return verdict


def _judge(library: Path, send: Connection) -> None:
    torch.set_num_threads(1)
    try:
        with Simulation(library).installed():
            run_everything_once()
    except AssertionError as error:
        send.send(str(error))
    else:
        send.send(None)


def verdicts(names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each fault with what noticed it, or None; "none" is the sources as they are."""
    with tempfile.TemporaryDirectory() as root:
        bindings = compile_bindings(Path(root))
        for name in names:
            folder = Path(root) / name
            folder.mkdir()
            yield name, judge(compile_simulation(folder, plant(FAULTS.get(name), folder), bindings))


def main(names: list[str]) -> int:
    wrong = []
    for name, verdict in verdicts(names or ("none", *FAULTS)):
        if (verdict is None) != (name == "none"):
            wrong.append(name)
        print(f"{name}: {verdict or 'nothing noticed'}", flush=True)
    print(f"not as they should be: {', '.join(wrong)}" if wrong else "every fault was noticed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
