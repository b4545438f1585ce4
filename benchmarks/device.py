"""The benchmark on a GPU: each workload gated and timed against every fused kernel of torch's, and what a call costs the host.

python -m fused_attention.benchmarks.device [--record FILE] [--until TIME] [--items NAME ...]      then device_report FILE: the table
python -m fused_attention.benchmarks.device --compile-only                                         fills the compilers' caches beforehand
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .contenders import OURS, Contender
from .device_decoding import DECODINGS, Decoding
from .device_decoding import race as decoding_race
from .device_decoding import rehearsal_of as decoding_rehearsal
from .device_decoding import steps_of as decoding_steps
from .device_layers import LAYERS, race, rehearsal_of, steps_of
from .device_timing import DeviceProtocol, host_seconds
from .device_workloads import HOST, ITEMS, DeviceItem, rehearsal
from .measure import Row, measure
from .record import Record
from .rivals import FLEX, device_contenders, host_contenders
from .timing import Protocol
from .workloads import DTYPES, AttentionInputs, Workload, attention_inputs

SEED = 0
HOST_NAME = "host time"
DEVICE_LOST = 3  # exit status: the process can compute nothing any more, a new one may go on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", nargs="+", choices=[item.name for item in ITEMS], metavar="NAME", help="these alone")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="where results go, a line each; processes with records in one folder share"
    )
    parser.add_argument("--until", type=float, default=math.inf, metavar="TIME", help="seconds since 1970 after which nothing is begun")
    parser.add_argument("--compile-only", action="store_true", help="run once whoever compiles kernels, and time nothing")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU, to try the program itself")


def run(args: argparse.Namespace) -> int:
    """0 if every gate held, 1 if one did not, DEVICE_LOST if the GPU failed."""
    if not args.rehearse and not torch.cuda.is_available():
        print("no GPU that torch sees: this benchmark times one", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # torch explains each refused backend in warnings
    record, steps = Record(args.record), _steps(args)
    wrong = 0
    for name, step in steps.items():
        if not record.claim(name):
            continue
        if time.time() > args.until:
            record.ended(name, "left out", message="the time of the step was over")
            continue
        start = time.perf_counter()
        try:
            facts = step()
            outcome = "failed" if any(row["failed"] for row in facts.get("rows", [])) else "passed"
        except Exception as error:  # noqa: BLE001  # the other workloads still tell something
            outcome, facts = "failed", {"message": f"{type(error).__name__}: {error}"}
        if not args.rehearse and not _device_works():
            print(f"{name}: the device was lost", file=sys.stderr)
            os._exit(DEVICE_LOST)  # the interpreter's own way out would wait for the device
        wrong += outcome == "failed"
        record.ended(name, outcome, seconds=time.perf_counter() - start, **facts)
        print(f"{name}: {outcome} {facts.get('message', '')}", flush=True)
    return int(wrong > 0)


def _steps(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    items = [item for item in ITEMS if args.items is None or item.name in args.items]
    work = _compile if args.compile_only else _measure
    steps: dict[str, Callable[[], dict[str, Any]]] = {item.name: functools.partial(work, item, args) for item in items}
    if args.items is None:
        layers = _compile_layer if args.compile_only else _layer
        decodings = _compile_decoding if args.compile_only else _decoding
        steps |= {layer.name: functools.partial(layers, layer, args) for layer in LAYERS}
        steps |= {decoding.name: functools.partial(decodings, decoding, args) for decoding in DECODINGS}
        if not args.compile_only:
            steps[HOST_NAME] = functools.partial(_host, args)
    return steps


def _device_works() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _measure(item: DeviceItem, args: argparse.Namespace) -> dict[str, Any]:
    chosen = rehearsal(item) if args.rehearse else item
    dtype = (item.dtype, DTYPES[item.dtype])
    rows = measure(chosen.workload, "attention", dtype, _contenders(chosen.workload, args), _protocol(args), SEED)
    return {"workload": asdict(chosen.workload) | {"shape": chosen.workload.shape()}, "rows": [_as_json(row) for row in rows]}


def _protocol(args: argparse.Namespace) -> Protocol:
    return Protocol(least_rounds=2, most_rounds=2, budget=0.0) if args.rehearse else DeviceProtocol()


def _layer(layer: Workload, args: argparse.Namespace) -> dict[str, Any]:
    return race(rehearsal_of(layer), "fp32", _protocol(args)) if args.rehearse else race(layer, "bf16", _protocol(args))


def _compile_layer(layer: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Our step once: its kernels are those that timing will ask for."""
    steps, _ = steps_of(rehearsal_of(layer), "fp32", "cpu") if args.rehearse else steps_of(layer, "bf16", "cuda")
    steps[OURS]()
    return {}


def _decoding(decoding: Decoding, args: argparse.Namespace) -> dict[str, Any]:
    chosen, dtype = (decoding_rehearsal(decoding), "fp32") if args.rehearse else (decoding, "bf16")
    return decoding_race(chosen, dtype, _protocol(args))


def _compile_decoding(decoding: Decoding, args: argparse.Namespace) -> dict[str, Any]:
    """A step over each cache once."""
    chosen, dtype, device = (decoding_rehearsal(decoding), "fp32", "cpu") if args.rehearse else (decoding, "bf16", "cuda")
    for step in decoding_steps(chosen, dtype, device)[0].values():
        step()
    return {}


def _contenders(workload: Workload, args: argparse.Namespace) -> tuple[Contender, ...]:
    return device_contenders(workload, compiled=not args.rehearse)  # a compiler takes longer than a rehearsal may


def _as_json(row: Row) -> dict[str, Any]:
    """JSON has no inf or nan: they become strings."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(row).items()}


def _compile(item: DeviceItem, args: argparse.Namespace) -> dict[str, Any]:
    """Whoever compiles kernels once, forward without and with gradients, and backward: the kernels that timing will ask for."""
    chosen = rehearsal(item) if args.rehearse else item
    inputs = attention_inputs(chosen.workload, DTYPES[item.dtype], SEED, "cpu" if args.rehearse else "cuda")
    compiling = [contender for contender in _contenders(chosen.workload, args) if contender.name in (OURS, FLEX)]
    refusals = {contender.name: _refusal(contender, inputs) for contender in compiling}
    return {"refusals": {name: refusal for name, refusal in refusals.items() if refusal is not None}}


def _refusal(contender: Contender, inputs: AttentionInputs) -> str | None:
    try:
        made = contender.prepare(inputs)
        with torch.no_grad():
            made.forward()
        if made.lse is not None:
            made.lse()
        if inputs.workload.backward:
            torch.autograd.grad(made.forward(), tuple(made.leaves.values()), made.dout)
    except Exception as error:  # noqa: BLE001  # the benchmark itself will say it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _host(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of host time a call, for every contender that takes the shape; None where it refuses."""
    inputs = attention_inputs(HOST, torch.float32 if args.rehearse else torch.bfloat16, SEED, "cpu" if args.rehearse else "cuda")
    found = {contender.name: _host_microseconds(contender, inputs) for contender in host_contenders(compiled=not args.rehearse)}
    return {"shape": HOST.shape(), "host_microseconds": found}


def _host_microseconds(contender: Contender, inputs: AttentionInputs) -> dict[str, float] | None:
    """Of a forward call without gradients, and of forward and backward together."""
    try:
        made = contender.prepare(inputs)
        leaves = tuple(made.leaves.values())
        with torch.no_grad():
            inference = host_seconds(made.forward)
        training = host_seconds(lambda: torch.autograd.grad(made.forward(), leaves, made.dout))
    except Exception:  # noqa: BLE001  # whoever refuses here refused the workloads as well, with its reason
        return None
    return {"inference": 1e6 * inference, "training": 1e6 * training}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Attention on this machine's GPU, ours and torch's, checked and timed.")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
