"""Named workloads with the shapes of real models, and the work in them.

forward    2 (head_dim + head_dim_v) FLOPs a visible pair: 4 batch heads seqlen_q seqlen_k head_dim where every pair is visible
backward   2.5 times that; a linear layer of a module: 2 FLOPs a weight and token forward, 4 backward
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
Kind = Literal["attention", "module"]
ModuleKind = Literal["layer", "attention"]

BACKWARD_OVER_FORWARD = 2.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One attention call of a real model, and the module of torch.nn it sits in.

    Packed sequences: batch is 1, and both lengths are the sum of `lengths`.
    """

    name: str
    title: str
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    causal: bool = False
    window: int | None = None  # keys before the diagonal that a query sees
    kv_lengths: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None  # of packed sequences, queries and keys alike
    bias: bool = False  # (1, heads, seqlen_q, seqlen_k), with its gradient
    softcap: float | None = None
    backward: bool = True
    module: ModuleKind | None = None
    module_reason: str | None = None  # why torch.nn has no module for it
    norm_first: bool = True

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def embed_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def cross(self) -> bool:
        return self.seqlen_q != self.seqlen_k

    @property
    def directions(self) -> tuple[Direction, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    def shape(self) -> str:
        heads = f"{self.heads}/{self.key_heads}" if self.group > 1 else f"{self.heads}"
        lengths = f"{self.seqlen_q} x {self.seqlen_k}" if self.cross else f"{self.seqlen_q}"
        extras = [word for word, on in (("causal", self.causal), ("padded", self.kv_lengths is not None), ("bias", self.bias)) if on]
        extras += [f"{name} {value}" for name, value in (("window", self.window), ("softcap", self.softcap)) if value is not None]
        if self.lengths is not None:
            extras.append(f"{len(self.lengths)} packed")
        return ", ".join([f"batch {self.batch}", f"heads {heads}", f"seqlen {lengths}", f"head_dim {self.head_dim}", *extras])


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt2-small", "GPT-2 small", 1, 12, 1024, 1024, 64, causal=True, module="layer"),
        Workload("bert-base", "BERT-base", 2, 12, 512, 512, 64, kv_lengths=(512, 317), module="layer", norm_first=False),
        Workload("vit-base", "ViT-B/16", 4, 12, 197, 197, 64, module="layer"),
        Workload("whisper-encoder", "Whisper-base encoder", 1, 8, 1500, 1500, 64, module="attention"),
        Workload("whisper-cross", "Whisper-base cross-attention", 1, 8, 448, 1500, 64, module="attention"),
        Workload(
            "llama-gqa", "Llama-style grouped heads", 1, 32, 1024, 1024, 128, kv_heads=8, causal=True,
            module_reason="torch.nn's modules have one kv head a query head; this workload shares each among 4",
        ),
        Workload(
            "decode-gqa", "one decode step, grouped heads", 1, 32, 1, 4096, 128, kv_heads=8, backward=False,
            module_reason="torch.nn's modules have no cache of keys and no grouped heads",
        ),
    )
}  # fmt: skip
QUICK = ("vit-base", "whisper-cross")  # one with its layer, one with unequal lengths; half a minute with the rest of --quick


def visible_pairs(workload: Workload) -> int:
    """Pairs (query, key) that may attend, over the whole batch and all query heads; causal is aligned to the last key."""
    if workload.lengths is not None:
        return workload.heads * sum(_pairs_of_a_head(workload, length, length) for length in workload.lengths)
    ends = [workload.seqlen_k] * workload.batch if workload.kv_lengths is None else workload.kv_lengths[: workload.batch]
    return workload.heads * sum(_pairs_of_a_head(workload, workload.seqlen_q, min(max(end, 0), workload.seqlen_k)) for end in ends)


def _pairs_of_a_head(workload: Workload, seqlen_q: int, seqlen_k: int) -> int:
    diagonal = torch.arange(seqlen_q) + seqlen_k - seqlen_q
    high = diagonal + 1 if workload.causal else torch.full_like(diagonal, seqlen_k)
    low = torch.zeros_like(diagonal) if workload.window is None else (diagonal - workload.window).clamp_min(0)
    return int((high.clamp(0, seqlen_k) - low).clamp_min(0).sum())


def attention_flops(workload: Workload, direction: Direction) -> float:
    forward = 4.0 * workload.head_dim * visible_pairs(workload)
    return forward if direction == "forward" else BACKWARD_OVER_FORWARD * forward


def module_flops(workload: Workload, direction: Direction) -> float:
    """The attention of a module and its linear layers: four projections, and for a layer the two of its feed-forward network."""
    queries, keys, width = workload.batch * workload.seqlen_q, workload.batch * workload.seqlen_k, workload.embed_dim
    weights_and_tokens = 2 * (queries + keys) * width * width
    if workload.module == "layer":
        weights_and_tokens += 2 * queries * width * feedforward_dim(workload)
    return attention_flops(workload, direction) + (2.0 if direction == "forward" else 4.0) * weights_and_tokens


def feedforward_dim(workload: Workload) -> int:
    return 4 * workload.embed_dim


def decode_bytes(workload: Workload, dtype: torch.dtype) -> int:
    """Bytes of the keys and values that one pass has to read."""
    return 2 * workload.batch * workload.key_heads * workload.seqlen_k * workload.head_dim * dtype.itemsize


@dataclass(frozen=True)
class AttentionInputs:
    """q (batch, heads, seqlen_q, head_dim), k, v (batch, kv_heads, seqlen_k, head_dim), dout like q, all contiguous.

    Packed: (total, heads, head_dim). The leaves take gradients.
    """

    workload: Workload
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of fused_attention.attention, or of attention_varlen

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What takes a gradient, by its name."""
        found = {"dq": self.q, "dk": self.k, "dv": self.v}
        return found | ({"dbias": self.options["bias"]} if self.workload.bias else {})

    @functools.cached_property
    def visible(self) -> Tensor | None:
        """The mask (batch or 1, 1, seqlen_q or 1, seqlen_k) that contenders without our options need."""
        return _visible(self.workload, self.q.device)


def attention_inputs(workload: Workload, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> AttentionInputs:
    generator = _generator(workload, seed, device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    lead = (workload.batch,) if workload.lengths is None else ()
    queries, keys = ((workload.heads, workload.seqlen_q), (workload.key_heads, workload.seqlen_k))
    if workload.lengths is not None:
        queries, keys = queries[::-1], keys[::-1]
    q, k, v, dout = (normal(*lead, *shape, workload.head_dim) for shape in (queries, keys, keys, queries))
    options: dict[str, Any] = {"causal": True} if workload.causal else {}
    options |= {} if workload.window is None else {"window": (workload.window, None)}
    options |= {} if workload.softcap is None else {"softcap": workload.softcap}
    if workload.kv_lengths is not None:
        options["kv_lengths"] = torch.tensor(workload.kv_lengths, dtype=torch.int32, device=device)
    if workload.lengths is not None:
        options["cu_seqlens_q"] = torch.tensor((0, *workload.lengths), device=device).cumsum(0).to(torch.int32)
    if workload.bias:
        options["bias"] = normal(1, workload.heads, workload.seqlen_q, workload.seqlen_k)
    inputs = AttentionInputs(workload, q, k, v, dout, options)
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(workload.backward)
    return inputs


@dataclass(frozen=True)
class ModuleInputs:
    """x (batch, seqlen_q, embed_dim), memory (batch, seqlen_k, embed_dim), the same tensor unless cross; padding True where no key is."""

    workload: Workload
    x: Tensor
    memory: Tensor
    dout: Tensor
    padding: Tensor | None


def module_inputs(workload: Workload, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> ModuleInputs:
    generator = _generator(workload, seed, device)

    def normal(seqlen: int) -> Tensor:
        return torch.randn(workload.batch, seqlen, workload.embed_dim, generator=generator, device=device).to(dtype)

    x, dout = (normal(workload.seqlen_q) for _ in range(2))
    memory = x.requires_grad_()
    if workload.cross:
        memory = normal(workload.seqlen_k).requires_grad_()
    visible = None if workload.kv_lengths is None else _visible_keys(workload, device)
    return ModuleInputs(workload, x, memory, dout, None if visible is None else ~visible)


def _generator(workload: Workload, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed + zlib.crc32(workload.name.encode()))


def _visible_keys(workload: Workload, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(workload.seqlen_k, device=device) < torch.tensor(workload.kv_lengths, device=device)[:, None]


def _visible(workload: Workload, device: torch.device) -> Tensor | None:
    if workload.causal or workload.window is not None:
        ahead = torch.arange(workload.seqlen_k, device=device) - torch.arange(workload.seqlen_q, device=device)[:, None]
        ahead -= workload.seqlen_k - workload.seqlen_q
        seen = ahead <= 0 if workload.causal else torch.ones_like(ahead, dtype=torch.bool)
        return (seen if workload.window is None else seen & (ahead >= -workload.window))[None, None]
    if workload.kv_lengths is not None:
        return _visible_keys(workload, device)[:, None, None, :]
    return None
