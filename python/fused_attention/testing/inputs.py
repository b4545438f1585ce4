"""A problem by its facts, its tensors drawn from a seed, and the tensors run through a backend or through the oracle.

Case(facts).make(device, dtype, seed) -> Inputs;      check(inputs.run(backend), inputs.truth())
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .oracle import Truth, oracle

GRADIENTS = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call: q, k, v, the options by their names in `attention`, and the gradients of out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor | None  # None: the loss is one of out alone

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.options

    def truth(self, *, backward: bool = True) -> Truth:
        if not backward:
            return oracle(self.q, self.k, self.v, **self.options)
        return oracle(self.q, self.k, self.v, **self.options, dout=self.dout, dlse=self.dlse)

    def run(self, backend: str | None = None, *, backward: bool = True) -> dict[str, Tensor]:
        """out, lse and with backward every gradient, under the names that `check` knows."""
        from fused_attention import attention_varlen_with_lse, attention_with_lse

        function = attention_varlen_with_lse if self.packed else attention_with_lse
        given = {"q": self.q, "k": self.k, "v": self.v} | {name: self.options.get(name) for name in GRADIENTS[3:]}
        leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in given.items() if tensor is not None}
        out, lse = function(**(self.options | leaves), backend=backend)
        result = {"out": out.detach(), "lse": lse.detach()}
        if backward:
            # Without a single key, lse is a constant.
            roots = [(x, dx) for x, dx in ((out, self.dout), (lse, self.dlse)) if x.requires_grad and dx is not None]
            outputs, cotangents = zip(*roots, strict=True)
            gradients = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents, materialize_grads=True)
            result |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return result

    def explain(self, backend: str | None = None) -> Any:
        from fused_attention import explain

        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.options.items() if name in GRADIENTS}
        q, k, v = (tensor.detach().requires_grad_() for tensor in (self.q, self.k, self.v))
        return explain(q, k, v, **(self.options | leaves), backend=backend)

    def changed(self, **fields: Any) -> Inputs:
        """The same with other tensors, or with other options: `options` given here are added, None takes one away."""
        options = self.options | fields.pop("options", {})
        return replace(self, **fields, options={name: value for name, value in options.items() if value is not None})


@dataclass(frozen=True)
class Case:
    """A problem by its facts; tensors are drawn from a seed in make()."""

    name: str
    batch: int = 2
    heads: int = 3
    kv_heads: int | None = None  # None: as many as heads
    seqlen_q: int = 13
    seqlen_k: int = 17
    head_dim: int = 8
    head_dim_v: int | None = None  # None: head_dim
    lengths_q: tuple[int, ...] | None = None  # packed: one for each member, instead of batch, seqlen_q, seqlen_k
    lengths_k: tuple[int, ...] | None = None
    unused: int = 0  # packed rows past the last member
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    offset: int | tuple[int, ...] | None = None  # one, or one for each member
    mask: str | None = None  # broadcast pattern: "qk", or 4 letters of "bhqk" with 1 for a size of 1, as "b11k"
    mask_block: int | None = None  # the mask hides whole squares of this many queries and keys besides
    bias: str | None = None
    hiding_bias: bool = False  # some of the bias is -inf
    kv_lengths: tuple[int, ...] | tuple[tuple[int, int], ...] | None = None
    alibi_slopes: str | None = None  # "h" or "bh"
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"  # or any other of lay_out
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0  # of q: scores grow with it

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0) -> Inputs:
        dtype = dtype or self.dtype
        draw = Draw(torch.Generator().manual_seed(seed), torch.device(device), dtype)
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        head_dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        if self.lengths_q is None:
            q_shape: tuple[int, ...] = (self.batch, self.heads, self.seqlen_q)
            k_shape: tuple[int, ...] = (self.batch, kv_heads, self.seqlen_k)
            lse_shape = q_shape
        else:
            lengths_k = self.lengths_q if self.lengths_k is None else self.lengths_k
            q_shape, k_shape = (sum(self.lengths_q) + self.unused, self.heads), (sum(lengths_k) + self.unused, kv_heads)
            lse_shape = (self.heads, q_shape[0])
        return Inputs(
            q=draw.normal((*q_shape, self.head_dim), self.layout, self.magnitude),
            k=draw.normal((*k_shape, self.head_dim), self.layout),
            v=draw.normal((*k_shape, head_dim_v), self.layout),
            options=self._options(draw),
            dout=draw.normal((*q_shape, head_dim_v), "contiguous" if self.layout == "expanded" else self.layout),
            dlse=draw.normal(lse_shape, dtype=torch.float64 if dtype is torch.float64 else torch.float32),
        )

    @property
    def members(self) -> int:
        return self.batch if self.lengths_q is None else len(self.lengths_q)

    def _options(self, draw: Draw) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.lengths_q is not None:
            options["cu_seqlens_q"] = draw.cumulative(self.lengths_q)
            if self.lengths_k is not None:
                options["cu_seqlens_k"] = draw.cumulative(self.lengths_k)
        if self.causal:
            options["causal"] = True
        options |= {name: getattr(self, name) for name in ("window", "softcap", "scale") if getattr(self, name) is not None}
        if self.offset is not None:
            options["offset"] = draw.integers(self.offset) if isinstance(self.offset, tuple) else self.offset
        if self.mask is not None:
            options["mask"] = draw.mask(self._pattern(self.mask), self.mask_block)
        if self.bias is not None:
            options["bias"] = draw.bias(self._pattern(self.bias), self.hiding_bias)
        if self.kv_lengths is not None:
            options["kv_lengths"] = draw.integers(self.kv_lengths)
        precise = torch.float64 if draw.dtype is torch.float64 else torch.float32
        if self.alibi_slopes is not None:
            shape = (self.heads,) if self.alibi_slopes == "h" else (self.members, self.heads)
            options["alibi_slopes"] = draw.normal(shape, dtype=precise).abs() * 0.3
        if self.sinks:
            options["sinks"] = draw.normal((self.heads,), dtype=precise)
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p
            options["dropout_seed"] = torch.tensor([0x123456789ABCDEF, 2**32 + 5], device=draw.device)
        return options

    def _pattern(self, letters: str) -> tuple[int, ...]:
        sizes = {"b": self.batch, "h": self.heads, "q": self.seqlen_q, "k": self.seqlen_k, "1": 1}
        return tuple(sizes[letter] for letter in letters)


@dataclass(frozen=True)
class Draw:
    """Random tensors of one device and type, from one generator on the CPU, so that every device gets the same."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def normal(
        self, shape: tuple[int, ...], layout: str = "contiguous", magnitude: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        values = (torch.randn(shape, generator=self.generator, dtype=torch.float64) * magnitude).to(dtype or self.dtype)
        return lay_out(values.to(self.device), layout)

    def mask(self, shape: tuple[int, ...], block: int | None = None) -> Tensor:
        hidden = torch.rand(shape, generator=self.generator) < 0.3
        hidden.view(-1)[:1] = True  # a mask of one value would otherwise change nothing
        if block is not None:
            rows, columns = shape[-2:]
            blocks = torch.rand((*shape[:-2], -(-rows // block), -(-columns // block)), generator=self.generator) < 0.5
            hidden |= blocks.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :columns]
        return (~hidden).to(self.device)

    def bias(self, shape: tuple[int, ...], hiding: bool) -> Tensor:
        bias = self.normal(shape)
        return bias.masked_fill(torch.rand(shape, generator=self.generator).to(self.device) < 0.3, -math.inf) if hiding else bias

    def integers(self, values: tuple[Any, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).to(self.device, torch.int32)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another order of memory; "expanded" repeats the first head of each member."""
    if layout == "transposed":  # seqlen before heads
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "interleaved":  # as a slice of a fused projection: rows are not adjacent
        return torch.stack([values, torch.full_like(values, math.nan)], dim=-2)[..., 0, :]
    if layout == "strided":  # no unit stride anywhere
        return torch.stack([values, torch.full_like(values, math.nan)], dim=-1)[..., 0]
    if layout == "column":  # head_dim is the slowest
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":  # off every alignment
        flat = torch.cat([values.new_full((1,), math.nan), values.flatten()])
        return flat[1:].view(values.shape)
    if layout == "expanded" and values.dim() == 4:
        return values[:, :1].expand(values.shape)
    return values
