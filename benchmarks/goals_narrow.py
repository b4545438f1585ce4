"""The goals of the AVX2 kernels, in a process of their own: `python -m fused_attention.benchmarks.goals_narrow`, JSON.

FUSED_ATTENTION_CPU_ISA=avx2    kernels are chosen once a process
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import torch

from .goals import narrow_goals
from .goals_judged import Judged, Pair, Result, judge
from .timing import Protocol, keep_freed_memory

ISA = "avx2"


def judge_narrow(runs: int, protocol: Protocol) -> Judged:
    """What the process found; what it was to find is left out, with the reason, where this CPU lacks the instructions."""
    command = [sys.executable, "-m", __name__, str(runs), str(protocol.least_rounds), str(protocol.budget)]
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": ISA}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Judged([], {f"the {ISA} kernels": done.stderr.strip().splitlines()[-1]})
    rows = [{**row, "runs": tuple(Pair(*run) for run in row["runs"])} for row in json.loads(done.stdout)]
    return Judged([Result(**row) for row in rows], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("least_rounds", type=int)
    parser.add_argument("budget", type=float, help="seconds of a contender beyond the least rounds")
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    protocol = replace(Protocol(), least_rounds=given.least_rounds, budget=given.budget)
    results, _ = judge(list(narrow_goals()), protocol, given.runs)
    print(json.dumps([{**vars(result), "title": f"{ISA}: {result.title}"} for result in results]))


if __name__ == "__main__":
    main()
