"""Are the faults in the CUDA sources noticed?  Each is compiled in a copy, for one type alone, and run in a process of its own.

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
from typing import NamedTuple

import torch

from .faults import FAULTS, Fault
from .problems import run_everything_once
from .simulation import ROOT, Simulation, compile_bindings, compile_simulation

SECONDS = 300  # of one fault, on a machine that does other things too
TYPES = ("bfloat16", "float16", "float32")
STUB = """#include "cuda/kernels.h"
int forward_{0}(const AttentionParams&, Stream) {{ return 1; }}
int split_{0}(const AttentionParams&, Stream) {{ return 1; }}
int backward_{0}(const AttentionParams&, Stream) {{ return 1; }}
"""


def plant(fault: Fault | None, folder: Path) -> Path:
    """A copy of the sources with the fault, and with the kernels for one type alone."""
    sources: Path = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if fault is not None:
        path = sources / "cuda" / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.file} holds {text.count(fault.old)} times, not once: {fault.old}")
        path.write_text(text.replace(fault.old, fault.new))
    for name in TYPES:
        if name != type_of(fault):
            (sources / "cuda" / f"{name}.cu").write_text(STUB.format(name))
    return sources


def type_of(fault: Fault | None) -> str:
    return TYPES[0] if fault is None else fault.type


class Verdict(NamedTuple):
    text: str | None  # what was noticed
    checked: bool = True  # by the machine or a bound; a process that only dies shows nothing about the watch


def judge(library: Path, dtype: torch.dtype) -> Verdict:
    """What is noticed first, in a child process: a fault may end it, and one process would take two libraries' symbols for one."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_judge, args=(library, dtype, send))
    child.start()
    send.close()
    try:
        verdict = Verdict(receive.recv()) if receive.poll(SECONDS) else Verdict(f"nothing came within {SECONDS} seconds", False)
    except EOFError:
        verdict = Verdict("the process ended without a word", False)
    child.kill()
    child.join()
    return verdict


def _judge(library: Path, dtype: torch.dtype, send: Connection) -> None:
    torch.set_num_threads(1)
    try:
        with Simulation(library).installed():
            run_everything_once(dtype)
    except AssertionError as error:
        send.send(str(error))
    else:
        send.send(None)


def verdicts(names: Iterable[str]) -> Iterator[tuple[str, Verdict]]:
    """Each fault with what noticed it; "none" is the sources as they are."""
    with tempfile.TemporaryDirectory() as root:
        bindings = compile_bindings(Path(root))
        for name in names:
            folder = Path(root) / name
            folder.mkdir()
            fault = FAULTS.get(name)
            yield name, judge(compile_simulation(folder, plant(fault, folder), bindings), getattr(torch, type_of(fault)))
            shutil.rmtree(folder)


def main(names: list[str]) -> int:
    wrong = []
    for name, (text, checked) in verdicts(names or ("none", *FAULTS)):
        if (text is None) != (name == "none") or not checked:
            wrong.append(name)
        print(f"{name}: {(text or 'nothing noticed').splitlines()[0]}", flush=True)
    print(f"not as they should be: {', '.join(wrong)}" if wrong else "every fault was noticed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
