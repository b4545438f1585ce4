"""Whether every kernel can be launched with every option at once: shared memory and tensor memory, on every architecture.

    python -m tests.codegen.fits

The assembler is left out, so a kernel takes a second.
"""

from __future__ import annotations

import argparse
import sys

import triton

from . import build, ledger, points, source


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--architecture", action="append", help="only this one, such as sm_90; may be repeated")
    options.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    given = options.parse_args()

    source.find()
    wanted = [point for point in points.crowded_points() if given.architecture is None or point.architecture in given.architecture]
    bad, count = [], 0
    for name, row in ledger.compile_all(ledger.kernels(wanted), given.jobs, build.memory):
        count += 1
        bad += [f"{name}: {row}"] if isinstance(row, str) else ledger.misfits(name, row, build.SHARED_LIMITS[name.split()[0]])
    print("\n".join([*bad, f"triton {triton.__version__}: {count} kernels, {len(bad)} do not fit"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
