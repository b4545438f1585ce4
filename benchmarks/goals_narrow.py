"""The goals of the AVX2 kernels, in a process of their own: `python -m fused_attention.benchmarks.goals_narrow`, JSON.

FUSED_ATTENTION_CPU_ISA=avx2    kernels are chosen once a process
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import torch

from .goals import narrow_goals
from .goals_judged import Judged, Pair, Result, judge
from .timing import Protocol, keep_freed_memory

ISA = "avx2"


def judge_narrow(runs: int, protocol: Protocol) -> Judged:
    """What the process found, and left out: all of it where this CPU lacks the instructions.

    RuntimeError: it ended otherwise, by a signal or an error of its own.
    """
    settings = runs, protocol.threads, protocol.least_rounds, protocol.budget
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": ISA}
    command = [sys.executable, "-m", __name__, *map(str, settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        ended = f"by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"with status {done.returncode}"
        raise RuntimeError(f"the process of the {ISA} kernels ended {ended}: {done.stderr.strip() or 'it said nothing'}")
    found = json.loads(done.stdout)
    rows = [{**row, "runs": tuple(Pair(*run) for run in row["runs"])} for row in found["results"]]
    return Judged([Result(**row) for row in rows], found["left_out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("least_rounds", type=int)
    parser.add_argument("budget", type=float, help="seconds of a contender beyond the least rounds")
    given = parser.parse_args()
    results, left_out = _found(given)
    rows = [{**vars(result), "title": f"{ISA}: {result.title}"} for result in results]
    print(json.dumps({"results": rows, "left_out": {f"{ISA}: {title}": reason for title, reason in left_out.items()}}))


def _found(given: argparse.Namespace) -> Judged:
    from fused_attention import _cpu

    try:
        _cpu.isa()
    except RuntimeError as reason:  # of the one function that chooses the kernels: this CPU cannot run them
        return Judged([], {"every goal": str(reason)})
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    protocol = replace(Protocol(), threads=given.threads, least_rounds=given.least_rounds, budget=given.budget)
    return judge(list(narrow_goals()), protocol, given.runs)


if __name__ == "__main__":
    main()
