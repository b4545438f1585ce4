"""The command line: `fused-attention info | verify | bench | compare`, the same as `python -m fused_attention`.

A command is loaded when it is asked for, so that `info` works where the extras of the others are missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from typing import Any, NamedTuple

EXTRAS = {"rich": "bench", "matplotlib": "bench", "pytest": "test", "hypothesis": "test", "numpy": "test"}


class Command(NamedTuple):
    """A command, what it does, and the module whose add_arguments(parser) and run(args) -> int carry it out."""

    name: str
    help: str
    module: str | None  # None: here


COMMANDS = (
    Command("info", "versions, devices, each backend with its reason if it is off, and what the installation compiled", None),
    Command("verify", "check this machine's backends against the float64 oracle", "fused_attention.testing.verify"),
    Command("bench", "check, then time against the naive reference and every rival found", "fused_attention.benchmarks.command"),
    Command("compare", "compare two results of bench", "fused_attention.benchmarks.comparison"),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 for a check that failed, 2 for a call that can't be carried out."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="fused-attention", description="Exact fused attention: what runs here, whether it is right, how fast."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    try:
        for command in COMMANDS:
            described = commands.add_parser(command.name, help=command.help, description=command.help)
            if arguments[:1] == [command.name]:
                _add_arguments(described, command)
        args = parser.parse_args(arguments)
        run: Any = args.run
        return int(run(args))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"fused-attention {arguments[0]} needs {error.name}: pip install fused-attention[{extra}]", file=sys.stderr)
        return 2


def _add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    if command.module is None:
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=info)
    else:
        module = importlib.import_module(command.module)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)


def info(args: argparse.Namespace) -> int:
    """Prints what is installed and what can run."""
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, entries in facts.items():
        print(f"{title}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
        if not entries:
            print("  none")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """The facts that `info` prints, by title."""
    import torch

    import fused_attention

    versions = {"fused_attention": fused_attention.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "versions": {**versions, "triton": _version("triton")},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
            "instruction set of the cpu backend": _instruction_set(),
            "threads": torch.get_num_threads(),
        },
        "gpus": {f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())},
        "backends": {name: reason or "on" for name, reason in fused_attention.backends().items()},
        "build": _build(),
    }


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return "not installed"


def _instruction_set() -> str:
    """Of the compiled kernels' tables the one in use."""
    try:
        return str(importlib.import_module("fused_attention._cpu").isa())
    except (ImportError, RuntimeError):  # `backends` says why
        return "none"


def _gpu(index: int) -> str:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def _build() -> dict[str, Any]:
    """For each compiled part what it was built with, or why it was not."""
    try:
        record = importlib.import_module("fused_attention._build_info")
    except ModuleNotFoundError:
        return {"record": "none: these are sources that no installation has built"}
    built = {name: ", ".join(f"{what} {value}" for what, value in facts.items()) for name, facts in record.BUILT.items()}
    return {name: f"not built: {reason}" if reason else built[name] for name, reason in record.REASONS.items()}


if __name__ == "__main__":
    sys.exit(main())
