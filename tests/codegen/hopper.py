"""What the kernels for sm_90 cost as a whole and in each turn of their main loops: the product's, and the experiments beside them.

    python -m tests.codegen.hopper            compile everything; a row that got worse, or that hopper.json does not know, fails
    python -m tests.codegen.hopper --update   compile and write hopper.json, which bound.py reads

The columns are those of the ledger, the copies of whole tiles by TMA, and of each main loop its Mix and how many of its exponentials
stand beside a product under way.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from . import build, ledger, loops, record, source
from .points import BATCH, HEADS, SEQLEN, Point, empty
from .record import Launch

LEDGER = Path(__file__).with_name("hopper.json")
ARCHITECTURE, HEAD_DIMS, OPTIONS, KERNELS = "sm_90", (64, 128, 256), ("plain", "causal"), ("forward", "key_value", "query")
KV_HEADS = 4
LIMIT = build.SHARED_LIMITS[ARCHITECTURE]
UPDATE = "python -m tests.codegen.hopper --update"
Counted = namedtuple("Counted", (*build.Cost._fields, "bulk_copies", "turns", "covered"))


def count(launch: Launch, architecture: str) -> Counted:
    compiled, said = build.build(launch, architecture)
    code = build.nvidia_code(compiled)
    main = loops.product_loops(code)
    # The loops that wait for a barrier are the innermost ones where tiles come by TMA, so spills are counted in the loops around products.
    spills = sum(name.startswith(("LDL", "STL")) for loop in main for _, name, _ in loop)
    cost = build.nvidia_cost(compiled, said)._replace(loop_spills=spills)
    copies = build.count(r"\bUTMALDG\b", code)
    return Counted(*cost, bulk_copies=copies, turns=list(map(loops.mix, main)), covered=list(map(loops.covered, main)))


def kernels() -> Iterator[tuple[str, str, Launch]]:
    """The name of each row, the architecture and the launch."""
    for head_dim in HEAD_DIMS:
        for options in OPTIONS:
            point = Point(ARCHITECTURE, "bfloat16", head_dim, options)
            for name, _, launch in ledger.kernels([point]):
                if launch.name in KERNELS:
                    yield name, ARCHITECTURE, launch
            for title, call in experiments(head_dim, options == "causal"):
                for launch in record.launches(ARCHITECTURE, call):
                    yield f"{point} {launch.name}{title}", ARCHITECTURE, launch


def experiments(head_dim: int, causal: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """What benchmarks/experiments holds, with what a row says beside the name of the kernel."""
    from fused_attention.benchmarks.experiments import key_value, s_ahead, warp_specialized

    from fused_attention.validation import check

    def call(forward: Callable[..., None], **choices: bool) -> None:
        q, k, v, out = (empty(BATCH, heads, SEQLEN, head_dim, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
        forward(q, k, v, out, empty(BATCH, HEADS, SEQLEN), check(q, k, v, causal=causal), **choices)

    def differentiate() -> None:
        q, k, v = (empty(BATCH, heads, SEQLEN, head_dim, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
        lse = empty(BATCH, HEADS, SEQLEN)
        key_value.key_value(q, q, k, v, lse, lse, k, v, check(q, k, v, causal=causal))

    yield "", differentiate
    yield "", functools.partial(call, s_ahead.forward)
    yield "", functools.partial(call, warp_specialized.forward)
    yield " ping-pong", functools.partial(call, warp_specialized.forward, ping_pong=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--update", action="store_true", help="write hopper.json")
    options.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="rows whose name holds one of these")
    options.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    given = options.parse_args()

    source.find()
    wanted = [each for each in kernels() if any(text in each[0] for text in given.only)]
    known, fresh, bad = ledger.read(LEDGER), {}, []
    for name, row in ledger.compile_all(wanted, given.jobs, count):
        if isinstance(row, str):
            bad.append(f"{name}: {row}")
            continue
        fresh[name] = row
        before = row if given.update else known.get(name, {}).get(triton.__version__)
        bad += ledger.complaints(f"triton {triton.__version__} {name}", row, before, LIMIT)
    if given.update:
        names = {name for name, _, _ in kernels()}
        kept = {name: versions for name, versions in known.items() if name in names}
        ledger.write(kept | {name: kept.get(name, {}) | {triton.__version__: row} for name, row in fresh.items()}, LEDGER)
    print("\n".join([*(line.replace(ledger.UPDATE, UPDATE) for line in bad), f"triton {triton.__version__}: {len(fresh)} kernels"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
