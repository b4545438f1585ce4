"""What the cpu backend is held to: `fused-attention bench --device cpu`, each class of calls raced against its rivals.

ratio = a rival's time / ours            a goal: how large it must be, and is meant to be
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from . import decoding
from .library_races import FLEX, ONNXRUNTIME, flex_race, onnxruntime_race
from .races import PEAK, Race, attention_race, layer_race, module_race, option_race, packed_race, plan_race, train_race
from .workloads import Direction, Workload, attention_flops

SDPA, NAIVE, TORCH_NN, CAREFUL = "torch SDPA", "naive", "torch.nn", "SDPA + F.linear"
ALLOWED, ALLOWED_SECONDS, CALLS = "3 us a call", 3e-6, 2000


@dataclass(frozen=True)
class Goal:
    """A race, and how many times faster than each rival we must be there, and would like to be."""

    title: str
    race: Callable[[], Race]
    must: Mapping[str, float]  # by rival
    aim: Mapping[str, float]
    flops: float | None = None  # of a call


def shape(name: str, batch: int, heads: int, seqlen: int, head_dim: int, **facts: Any) -> Workload:
    return Workload(name, name, batch, heads, facts.pop("seqlen_q", seqlen), seqlen, head_dim, **facts)


FULL = (shape("B4 H8 S512 D64", 4, 8, 512, 64), shape("B1 H8 S1024 D64", 1, 8, 1024, 64), shape("B1 H8 S2048 D64", 1, 8, 2048, 64))
WIDE = shape("B1 H8 S1024 D128", 1, 8, 1024, 128)
SHORT = shape("B8 H8 S128 D64", 8, 8, 128, 64)
TINY = shape("B1 H8 S16 D64", 1, 8, 16, 64)
DECODE = shape("MHA, B1 H8 S4096 D128", 1, 8, 4096, 128, seqlen_q=1, backward=False)
DECODE_GROUPS = shape("GQA, B1 H32/8 S4096 D128", 1, 32, 4096, 128, kv_heads=8, seqlen_q=1, backward=False)
LENGTHS = (179, 763, 310, 512, 233, 640, 421, 555)
LAYERS = (
    *(shape("E512 B8 S128", 8, 8, 128, 64), shape("E512 B1 S512", 1, 8, 512, 64)),
    *(shape("E512 B1 S1024", 1, 8, 1024, 64), shape("E512 B1 S2048", 1, 8, 2048, 64)),
)
WIDE_LAYERS = (shape("E1024 B8 S128", 8, 16, 128, 64), shape("E1024 B1 S512", 1, 16, 512, 64), shape("E1024 B1 S1024", 1, 16, 1024, 64))
OPTIONS = ("mask", "bias", "kv_lengths", "window", "alibi_slopes", "softcap")


def goals(shrink: int = 1) -> Iterator[Goal]:
    """All of them; every length is divided by `shrink`, for a test of the machinery."""
    for workload in (*FULL, WIDE):
        yield _attention("fp32 forward", workload, shrink, {SDPA: 2.3, PEAK: 0.8}, {SDPA: 2.5, PEAK: 0.91})
        bf16 = {SDPA: 4.2, NAIVE: 1.4 if workload is WIDE else 1.6}
        yield _attention("bf16 forward", workload, shrink, bf16, {SDPA: 4.8})
        short = workload.seqlen_k <= 512
        yield _attention("fp32 forward", _causal(workload), shrink, {SDPA: 3.8 if short else 2.6}, {SDPA: 4.5 if short else 3.0})
        yield _attention("bf16 forward", _causal(workload), shrink, {SDPA: 6.5 if short else 4.5}, {SDPA: 8.0 if short else 5.5})
    yield _attention("fp16 forward", FULL[1], shrink, {SDPA: 2.5}, {SDPA: 3.3})
    yield _attention("fp32 forward", SHORT, shrink, {SDPA: 2.0, NAIVE: 1.0}, {SDPA: 3.0})
    yield _attention("bf16 forward", SHORT, shrink, {SDPA: 4.0, NAIVE: 1.0}, {SDPA: 6.0})
    for workload in (FULL[0], FULL[1], WIDE):
        yield _attention("fp32 backward", workload, shrink, {SDPA: 2.3}, {SDPA: 2.6})
        yield _attention("fp32 backward", _causal(workload), shrink, {SDPA: 3.0}, {SDPA: 3.5})
        yield _attention("bf16 backward", workload, shrink, {SDPA: 2.8, NAIVE: 1.05}, {SDPA: 3.2, NAIVE: 1.3})
    for workload in (FULL[1], _causal(FULL[1])):
        compiled = partial(flex_race, _shrunk(workload, shrink), compiled=shrink == 1)
        yield Goal(_title("fp32 forward", workload, beside=FLEX), compiled, {FLEX: 2.3}, {})
    for workload in FULL[:2]:
        for each, must in ((workload, 1.05), (_causal(workload), 2.4)):
            prepared = partial(onnxruntime_race, _shrunk(each, shrink))
            yield Goal(_title("fp32 forward", each, beside=ONNXRUNTIME), prepared, {ONNXRUNTIME: must}, {})
    yield _attention("bf16 decode", DECODE, shrink, {SDPA: 8.0, NAIVE: 1.5}, {SDPA: 12.0})
    yield _attention("bf16 decode", DECODE_GROUPS, shrink, {SDPA: 20.0, NAIVE: 1.5}, {SDPA: 50.0})
    yield _attention("fp32 decode", DECODE, shrink, {SDPA: 1.6}, {SDPA: 2.3})
    yield _attention("fp32 decode", DECODE_GROUPS, shrink, {SDPA: 3.0}, {SDPA: 8.0})
    for row in decoding.rows(shrink):
        yield Goal(*row)
    packed = {"padded, with a mask": 4.0, "one by one": 2.2}
    lengths = tuple(length // shrink for length in LENGTHS)
    for dtype in ("fp32", "bf16"):
        yield Goal(f"{dtype} packed, 8 sequences of 179 to 763", lambda dtype=dtype: packed_race(lengths, dtype), packed, {})
    for workload in LAYERS:
        yield _layer("fp32", workload, shrink, {CAREFUL: 2.0, TORCH_NN: 2.1}, {CAREFUL: 2.4})
        if workload.seqlen_k >= 512:
            late = workload.seqlen_k >= 1024
            yield _layer("fp32", _causal(workload), shrink, {TORCH_NN: 3.0 if late else 2.5}, {TORCH_NN: 5.0 if late else 3.0})
    for workload, must in zip((*LAYERS, *WIDE_LAYERS), (1.2, 1.5, 1.5, 2.2, 1.15, 1.25, 1.25), strict=True):
        yield _layer("bf16", workload, shrink, {CAREFUL: must}, {})
    for workload in LAYERS[:2]:
        small = _shrunk(workload, shrink)
        for need_weights, must in ((False, 2.0), (True, 1.5)):
            title = f"fp32 MultiHeadAttention{', averaged weights' if need_weights else ''}, {workload.name}"
            yield Goal(title, partial(module_race, small, "fp32", need_weights), {TORCH_NN: must}, {})
        yield Goal(f"fp32 layer, training step, {workload.name}", lambda small=small: train_race(small, "fp32"), {TORCH_NN: 2.0}, {})
    for name in OPTIONS:
        race = _shrunk(FULL[1], shrink)
        yield Goal(f"fp32 {name}, a visible pair", lambda race=race, name=name: option_race(race, name), {"ours, plain": 0.8}, {})
    yield _attention("fp32 forward", TINY, 1, {SDPA: 1.2}, {SDPA: 1.5}, calls=100)
    yield Goal(f"plan found, listeners asked, {CALLS} calls", partial(plan_race, TINY, ALLOWED, ALLOWED_SECONDS, CALLS), {ALLOWED: 1.0}, {})


def narrow_goals(shrink: int = 1) -> Iterator[Goal]:
    """Those of the AVX2 kernels. PyTorch uses whatever the CPU has: for bfloat16 that can be dot products no AVX2 machine has."""
    for workload in (*FULL, WIDE):
        yield _attention("fp32 forward", workload, shrink, {SDPA: 1.1}, {})
        yield _attention("fp32 forward", _causal(workload), shrink, {SDPA: 0.95}, {})
    yield _attention("fp32 forward", SHORT, shrink, {SDPA: 0.95}, {})
    yield _attention("fp16 forward", FULL[1], shrink, {SDPA: 0.95}, {})
    yield _attention("fp32 backward", FULL[1], shrink, {SDPA: 0.95}, {})


def of_modules(goal: Goal) -> bool:
    """Whether a goal is one of the layers and modules, not of attention alone."""
    return bool({TORCH_NN, CAREFUL} & set(goal.must))


def _attention(title: str, workload: Workload, shrink: int, must: Mapping[str, float], aim: Mapping[str, float], calls: int = 1) -> Goal:
    dtype, _, direction = title.partition(" ")
    small = _shrunk(workload, shrink)
    way: Direction = "backward" if direction == "backward" else "forward"
    flops = attention_flops(small, way) * calls
    return Goal(_title(title, workload), lambda: attention_race(small, dtype, way, tuple(must), calls), must, aim, flops)


def _layer(dtype: str, workload: Workload, shrink: int, must: Mapping[str, float], aim: Mapping[str, float]) -> Goal:
    small = _shrunk(workload, shrink)
    return Goal(_title(f"{dtype} layer", workload), lambda: layer_race(small, dtype, tuple(must)), must, aim)


def _title(of: str, workload: Workload, beside: str | None = None) -> str:
    return f"{of}{', causal' if workload.causal else ''}, {workload.name}{'' if beside is None else f', beside {beside}'}"


def _causal(workload: Workload) -> Workload:
    return replace(workload, causal=True)


def _shrunk(workload: Workload, shrink: int) -> Workload:
    seqlen_q, seqlen_k = max(workload.seqlen_q // shrink, 1), max(workload.seqlen_k // shrink, 1)
    return replace(workload, seqlen_q=seqlen_q, seqlen_k=seqlen_k, module="layer")
