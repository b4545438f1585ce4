"""The races behind the goals: our call and its rivals on the same tensors, ready to be timed in turns.

race = ours and rivals, each a call without arguments
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention import attention, attention_varlen
from fused_attention.listeners import unheard
from fused_attention.plans import plan

from .contenders import OURS, contenders, our_module, run_module, torch_module
from .timing import Protocol, Timing
from .workloads import DTYPES, Direction, Workload, attention_flops, attention_inputs, module_inputs, visible_pairs

SEED = 0
PEAK = "FMA peak"  # as many operations, all of them multiply-adds of registers


@dataclass(frozen=True)
class Race:
    calls: Mapping[str, Callable[[], Any]]
    ours: str = OURS
    learns: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)  # what a time is multiplied with, where contenders differ in their work
    allowed: Mapping[str, float] = field(default_factory=dict)  # seconds that stand where a rival would, by its name

    def run(self, protocol: Protocol) -> dict[str, Timing]:
        with contextlib.nullcontext() if self.learns else torch.no_grad():
            times, _ = protocol.time_in_turns(self.calls)
        return times | {name: Timing.of([seconds]) for name, seconds in self.allowed.items()}


def attention_race(workload: Workload, dtype: str, direction: Direction, rivals: tuple[str, ...], calls: int = 1) -> Race:
    """Of attention alone; `calls` of them are timed together where one is too short for the clock."""
    inputs = attention_inputs(workload, DTYPES[dtype], SEED)
    runs = {each.name: each.prepare(inputs) for each in contenders("attention") if each.ours or each.name in rivals}
    if direction == "backward":
        return Race({name: _gradients(run.forward(), run.leaves, run.dout) for name, run in runs.items()}, learns=True)
    forward = {name: _repeated(run.forward, calls) for name, run in runs.items()}
    if PEAK not in rivals:
        return Race(forward)
    from fused_attention import _cpu

    steps = round(attention_flops(workload, direction) / _cpu.multiply_adds(1))
    return Race({**forward, PEAK: lambda: _cpu.multiply_adds(steps)})


def _gradients(out: Tensor, leaves: Mapping[str, Tensor], dout: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)


def _repeated(call: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def repeated() -> None:
        for _ in range(calls):
            call()

    return call if calls == 1 else repeated


def packed_race(lengths: tuple[int, ...], dtype: str, heads: int = 8, head_dim: int = 64) -> Race:
    """Packed sequences against a padded batch with a mask, and against one call a sequence."""
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(sum(lengths), heads, head_dim, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    members = [[x.transpose(0, 1)[None] for x in rows] for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)]
    padded = [nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2).contiguous() for t in (q, k, v)]
    real = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None]
    return Race(
        {
            OURS: lambda: attention_varlen(q, k, v, cu_seqlens),
            "padded, with a mask": lambda: F.scaled_dot_product_attention(*padded, attn_mask=real),
            "one by one": lambda: [F.scaled_dot_product_attention(*member) for member in members],
        }
    )


def layer_race(workload: Workload, dtype: str, rivals: tuple[str, ...]) -> Race:
    """A TransformerLayer in evaluation against torch.nn's, and against one written by hand on SDPA."""
    inputs = module_inputs(workload, DTYPES[dtype], SEED)
    theirs = torch_module(workload, DTYPES[dtype], SEED).eval()
    ours = our_module(workload, DTYPES[dtype], theirs).eval()
    calls = {
        OURS: run_module(ours, inputs, needs_mask=False).forward,
        "torch.nn": run_module(theirs, inputs, needs_mask=True).forward,
        "SDPA + F.linear": lambda: careful_layer(theirs, inputs.x, workload.causal),
    }
    return Race({name: call for name, call in calls.items() if name == OURS or name in rivals})


def module_race(workload: Workload, dtype: str, need_weights: bool) -> Race:
    """A MultiHeadAttention in evaluation against torch.nn's; need_weights: the weights too, averaged over the heads."""
    attention_only = replace(workload, module="attention")
    inputs = module_inputs(attention_only, DTYPES[dtype], SEED)
    theirs = torch_module(attention_only, DTYPES[dtype], SEED).eval()
    ours = our_module(attention_only, DTYPES[dtype], theirs).eval()
    return Race({name: _self_attention(module, inputs.x, need_weights) for name, module in ((OURS, ours), ("torch.nn", theirs))})


def _self_attention(module: nn.Module, x: Tensor, need_weights: bool) -> Callable[[], Any]:
    return lambda: module(x, x, x, need_weights=need_weights)[: 2 if need_weights else 1]


def careful_layer(layer: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """A pre-norm layer as an expert writes it in plain PyTorch: one projection for q, k and v, SDPA on views of it."""
    attend: Any = layer.self_attn
    module: Any = layer
    normed = module.norm1(x)
    q, k, v = (
        part.unflatten(-1, (attend.num_heads, -1)).transpose(1, 2)
        for part in F.linear(normed, attend.in_proj_weight, attend.in_proj_bias).chunk(3, -1)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + attend.out_proj(heads.transpose(1, 2).flatten(2))
    out: Tensor = x + module.linear2(F.gelu(module.linear1(module.norm2(x))))
    return out


def train_race(workload: Workload, dtype: str) -> Race:
    """A layer's forward and backward, all gradients, against torch.nn's."""
    inputs = module_inputs(workload, DTYPES[dtype], SEED)
    theirs = torch_module(workload, DTYPES[dtype], SEED)
    calls = {}
    for name, module in ((OURS, our_module(workload, DTYPES[dtype], theirs)), ("torch.nn", theirs)):
        run = run_module(module.train(), inputs, needs_mask=name != OURS)
        calls[name] = _step(run.forward, [inputs.x, *module.parameters()], inputs.dout)
    return Race(calls, learns=True)


def _step(forward: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), leaves, dout)


def option_race(workload: Workload, name: str) -> Race:
    """A call with an option against our own without, by the pairs that each sees."""
    inputs = attention_inputs(workload, torch.float32, SEED)
    q, k, v, seqlen = inputs.q, inputs.k, inputs.v, workload.seqlen_k
    generator = torch.Generator().manual_seed(SEED)
    options: dict[str, dict[str, Any]] = {
        "mask": {"mask": torch.rand(seqlen, seqlen, generator=generator) < 0.9},
        "bias": {"bias": torch.randn(seqlen, seqlen, generator=generator)},
        "kv_lengths": {"kv_lengths": torch.full((workload.batch,), seqlen * 3 // 4)},
        "window": {"window": (seqlen // 4, 0)},
        "alibi_slopes": {"alibi_slopes": 2.0 ** -torch.arange(1, workload.heads + 1).float()},
        "softcap": {"softcap": 30.0},
    }
    # A mask is read for every pair, seen or not; the others tell beforehand what they hide.
    seen = {"kv_lengths": 0.75, "window": _window_share(seqlen, seqlen // 4)}.get(name, 1.0)
    plain = "ours, plain"
    calls = {name: lambda: attention(q, k, v, **options[name]), plain: lambda: attention(q, k, v)}
    return Race(calls, ours=name, weights={name: 1.0 / seen, plain: 1.0})


def plan_race(workload: Workload, allowed: str, seconds: float, calls: int) -> Race:
    """Two steps of a call like an earlier one: to find its plan, and to ask who listens. The seconds they may take stand for a rival.

    The whole of what a call costs the host is what host_path.py prints.
    """
    inputs = attention_inputs(workload, torch.float32, SEED)
    q, k, v = (tensor.detach() for tensor in (inputs.q, inputs.k, inputs.v))

    def steps() -> None:
        for _ in range(calls):
            plan(q, k, v, {}, None)
            unheard(q, k, v)

    return Race({OURS: steps}, allowed={allowed: seconds * calls})


def _window_share(seqlen: int, left: int) -> float:
    """The visible part of a square whose queries see `left` keys before themselves, and none after."""
    one = Workload("window", "window", 1, 1, seqlen, seqlen, 1, causal=True, window=left)
    return visible_pairs(one) / math.prod((seqlen, seqlen))
