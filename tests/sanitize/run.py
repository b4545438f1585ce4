"""`make sanitize`: builds with sanitizers, and every problem of the CPU kernels through each; guard pages around the installed build.

    python -m tests.sanitize.run [address] [thread] [guard]

The problems are those of problems.py; without arguments all three parts run, also after one that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from .builds import SANITIZERS

SWEEP = [sys.executable, "-m", "tests.sanitize.sweep"]
THREADS = ["--threads", "1", "2", "7"]  # 7: more than there are heads, so that threads share one


def sanitized(name: str) -> bool:
    sanitizer = SANITIZERS[name]
    start = time.monotonic()
    module = sanitizer.build()
    print(f"{name}: built in {time.monotonic() - start:.0f} s", flush=True)
    return passes(name, sanitizer.command(*SWEEP, "--module", str(module), *THREADS), sanitizer.environment())


def guarded() -> bool:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sides = [passes(f"guard pages at the {side}", [*SWEEP, "--memory", side, *THREADS], environment) for side in ("end", "beginning")]
    return all(sides)


def passes(name: str, command: list[str], environment: dict[str, str]) -> bool:
    start = time.monotonic()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = run.stdout.splitlines() or [f"ended with {run.returncode} and no word"]
    print(f"{name}: {lines[-1] if run.returncode == 0 else 'FAILED'} ({time.monotonic() - start:.0f} s)", flush=True)
    if run.returncode:
        print("\n".join(lines[-60:]), flush=True)
    return run.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*SANITIZERS, "guard"])
    parts = parser.parse_args().parts
    jobs = {name: (lambda name=name: sanitized(name)) for name in SANITIZERS} | {"guard": guarded}
    passed = [jobs[part]() for part in parts]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
