"""A layer's training step on a GPU, ours beside torch.nn's on its own choice of attention kernels and on cuDNN's: time, memory, error.

a step    out = layer(x), then the gradients of x and of every parameter
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from .contenders import OURS, TORCH_MODULE, Run, our_module, run_module, torch_module
from .gate import ModuleGate, Results, results_of
from .timing import Protocol
from .workloads import DTYPES, Workload, module_inputs

SEED = 0
CUDNN = "torch.nn, cuDNN"
LAYERS = (
    Workload("layer-1k", "GPT-2 medium", 8, 16, 1024, 1024, 64, causal=True, module="layer"),
    Workload("layer-4k", "a long context", 2, 16, 4096, 4096, 64, causal=True, module="layer"),
)

Steps = dict[str, Callable[[], Results]]


def rehearsal_of(workload: Workload) -> Workload:
    """The same layer, small enough for a CPU."""
    return replace(workload, batch=2, heads=2, seqlen_q=32, seqlen_k=32, head_dim=16)


def steps_of(workload: Workload, dtype: str, device: str) -> tuple[Steps, ModuleGate]:
    """A training step of each contender on the same weights and inputs, and what judges their results."""
    inputs = module_inputs(workload, DTYPES[dtype], SEED, device)
    theirs = torch_module(workload, DTYPES[dtype], SEED).to(device).train()
    ours = our_module(workload, DTYPES[dtype], theirs).to(device).train()
    stock = run_module(theirs, inputs, needs_mask=True)
    steps: Steps = {
        OURS: functools.partial(results_of, run_module(ours, inputs, needs_mask=False)),
        TORCH_MODULE: functools.partial(results_of, stock),
    }
    if device == "cuda":
        steps[CUDNN] = functools.partial(_on_cudnn, stock)
    return steps, ModuleGate(inputs, theirs)


def _on_cudnn(run: Run) -> Results:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return results_of(run)


def race(workload: Workload, dtype: str, protocol: Protocol) -> dict[str, Any]:
    """What each contender needs for a step, by its name: milliseconds, extra_bytes and error_share, or the reason why there are none.

    Raises RuntimeError where ours is refused or wrong.
    """
    steps, gate = steps_of(workload, dtype, protocol.device)
    found: dict[str, dict[str, Any]] = {}
    for name, step in list(steps.items()):
        reason, used = _verdict(step, gate)
        if reason is None:
            found[name] = {"error_share": used}
            continue
        if name == OURS:
            raise RuntimeError(reason)
        found[name] = {"reason": reason}
        del steps[name]
    timings, _ = protocol.time_in_turns(steps)
    for name, step in steps.items():
        found[name] |= {"milliseconds": 1e3 * timings[name].median, "extra_bytes": protocol.extra_bytes(step)}
    return {"shape": workload.shape(), "layer_steps": found}


def _verdict(step: Callable[[], Results], gate: ModuleGate) -> tuple[str | None, float]:
    """Why the step does not count, if so, and its share of the error allowed."""
    try:
        verdicts = gate.judge(step(), bounded=False).values()
    except Exception as refusal:  # noqa: BLE001  # a kernel may refuse in any way
        return f"{type(refusal).__name__}: {refusal}".splitlines()[0], 0.0
    return next((each.failure for each in verdicts if each.failure is not None), None), max(each.used for each in verdicts)
