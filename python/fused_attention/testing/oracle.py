"""The truth: attention in float64, head by head, straight from its definition.

    scores  = scale q k'  ->  softcap tanh(scores / softcap)  ->  - slope |i + offset - j| + bias
    weights = softmax of the visible scores and the sink;   out = (weights * dropout) v;   lse = log of the sum of exponentials

It imports torch alone: visibility, dropout and gradients (float64 autograd through these lines) share nothing with the code they judge.
q, k and v must be finite; a test that plants a NaN compares the rows that do not see it with the truth of the input without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


class Head(NamedTuple):
    """Everything known about one head of one batch member, float64; rows are its queries, columns its keys."""

    q: Tensor  # (rows, head_dim)
    k: Tensor  # (columns, head_dim)
    v: Tensor  # (columns, head_dim_v)
    dout: Tensor  # (rows, head_dim_v)
    dlse: Tensor  # (rows,)
    bias: Tensor | None  # (rows or 1, columns or 1), -inf replaced by 0
    slope: Tensor | None  # ()
    sink: Tensor | None  # ()
    products: Tensor  # scale q k'
    capped: Tensor  # after the softcap
    scores: Tensor  # after alibi and bias
    distance: Tensor  # |i + offset - j|
    visible: Tensor  # bool
    row_max: Tensor  # (rows,), the largest visible score or sink, 0 where there is none
    weights: Tensor  # softmax, before dropout
    sink_weight: Tensor  # (rows,)
    dropout: Tensor | None  # 0 or 1 / (1 - p)
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Call:
    """One attention call in float64; dense (batch, heads, seqlen, dim) or, with cu_seqlens, packed (total, heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    scale: float
    left: int | None
    right: int | None
    offset: int | Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    kv_lengths: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: tuple[int, int]
    starts_q: tuple[int, ...] | None
    starts_k: tuple[int, ...] | None

    @property
    def batch(self) -> int:
        return len(self.starts_q) - 1 if self.starts_q is not None else self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        return self.heads // self.k.shape[1]

    def queries(self, tensor: Tensor, member: int) -> Tensor:
        """The view (heads, rows, ...) of one batch member, of a tensor laid out as q or as lse."""
        if self.starts_q is None:
            return tensor[member]
        rows = slice(self.starts_q[member], self.starts_q[member + 1])
        return tensor[:, rows] if tensor.dim() == 2 else tensor[rows].transpose(0, 1)

    def keys(self, tensor: Tensor, member: int) -> Tensor:
        """The view (kv_heads, columns, dim) of one batch member, of a tensor laid out as k or v."""
        if self.starts_k is None:
            return tensor[member]
        return tensor[self.starts_k[member] : self.starts_k[member + 1]].transpose(0, 1)

    @property
    def unused(self) -> slice:
        """Packed rows past the last member: like any row that sees nothing, they see at most the sink."""
        return slice(self.starts_q[-1] if self.starts_q is not None else self.q.shape[0], self.q.shape[0])

    def key_range(self, member: int, columns: int) -> tuple[int, int]:
        if self.kv_lengths is None:
            return 0, columns
        length = self.kv_lengths[member].tolist()
        start, end = length if isinstance(length, list) else (0, length)
        return min(max(start, 0), columns), min(max(end, 0), columns)

    def diagonal(self, member: int, rows: int, columns: int) -> int:
        """The offset: query i stands at position i + offset among the keys."""
        if self.offset is None:
            return self.key_range(member, columns)[1] - rows
        return self.offset if isinstance(self.offset, int) else int(self.offset[member])

    def visible(self, member: int, head: int, rows: int, columns: int) -> Tensor:
        start, end = self.key_range(member, columns)
        position = torch.arange(rows, device=self.q.device)[:, None] + self.diagonal(member, rows, columns)
        key = torch.arange(columns, device=self.q.device)[None, :]
        ahead = key - position
        visible = (key >= start) & (key < end) & torch.ones_like(ahead, dtype=torch.bool)
        if self.left is not None:
            visible = visible & (-ahead <= self.left)
        if self.right is not None:
            visible = visible & (ahead <= self.right)
        if self.mask is not None:
            visible = visible & self.pairs(self.mask, member, head)
        if self.bias is not None:
            visible = visible & (self.pairs(self.bias, member, head) != -math.inf)
        return visible

    @staticmethod
    def pairs(tensor: Tensor, member: int, head: int) -> Tensor:
        """The view (rows or 1, columns or 1) of a mask or bias, or of its gradient, that one head of one member reads."""
        if tensor.dim() == 2:
            return tensor
        return tensor[member if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]

    def slope(self, tensor: Tensor, member: int, head: int) -> Tensor:
        return tensor[head] if tensor.dim() == 1 else tensor[member, head]

    def head(self, member: int, head: int, *, leaves: bool = False) -> Head:
        """The definition, line by line; with leaves, q, k, v, bias, slope and sink of the result take gradients."""

        def own(view: Tensor) -> Tensor:
            return view.detach().clone().requires_grad_(leaves)

        q, k, v = own(self.queries(self.q, member)[head]), *(own(self.keys(t, member)[head // self.group]) for t in (self.k, self.v))
        rows, columns = q.shape[0], k.shape[0]
        bias = None if self.bias is None else own(self.pairs(self.bias, member, head).nan_to_num(nan=math.nan, neginf=0.0))
        slope = None if self.alibi_slopes is None else own(self.slope(self.alibi_slopes, member, head))
        sink = None if self.sinks is None else own(self.sinks[head])

        products = self.scale * (q @ k.transpose(0, 1))
        capped = products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)
        position = torch.arange(rows, device=q.device)[:, None] + self.diagonal(member, rows, columns)
        distance = (position - torch.arange(columns, device=q.device)[None, :]).abs().to(q.dtype)
        scores = capped
        if slope is not None:
            scores = scores - slope * distance
        if bias is not None:
            scores = scores + bias

        visible = self.visible(member, head, rows, columns)
        sink_logit = torch.full((rows, 1), -math.inf, dtype=q.dtype, device=q.device) if sink is None else sink.expand(rows, 1)
        logits = torch.cat([scores.masked_fill(~visible, -math.inf), sink_logit], dim=1)
        row_max = logits.detach().amax(dim=1)
        alive = row_max > -math.inf
        row_max = row_max.masked_fill(~alive, 0.0)
        exponentials = torch.exp(logits - row_max[:, None])
        row_sum = exponentials.sum(dim=1).masked_fill(~alive, 1.0)
        weights = exponentials / row_sum[:, None]
        lse = torch.where(alive, row_max + torch.log(row_sum), -math.inf)

        dropout = self.dropout(member, head, rows, columns)
        kept = weights[:, :-1] if dropout is None else weights[:, :-1] * dropout
        return Head(
            q, k, v, self.queries(self.dout, member)[head], self.queries(self.dlse, member)[head], bias, slope, sink,
            products, capped, scores, distance, visible, row_max, weights[:, :-1], weights[:, -1], dropout, kept @ v, lse,
        )  # fmt: skip

    def dropout(self, member: int, head: int, rows: int, columns: int) -> Tensor | None:
        if self.dropout_p == 0.0:
            return None
        if self.dropout_p == 1.0:
            return torch.zeros(rows, columns, dtype=self.q.dtype, device=self.q.device)
        seed, offset = self.dropout_seed
        i = torch.arange(rows, device=self.q.device)[:, None].expand(rows, columns)
        j = torch.arange(columns, device=self.q.device)[None, :].expand(rows, columns)
        stream = torch.full_like(i, member * self.heads + head)
        words = philox((j >> 2, i, stream, torch.full_like(i, offset & WORD)), (seed & WORD, (seed >> 32) & WORD))
        word = torch.stack(words).gather(0, (j & 3)[None])[0]
        return (word >= math.floor(self.dropout_p * 2**32)).to(self.q.dtype) / (1.0 - self.dropout_p)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al., 2011) on int64 tensors that hold 32-bit words."""
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        # An int64 product wraps modulo 2**64, so its bits are the product's; the mask undoes the sign that >> extends.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((second >> 32) & WORD) ^ b ^ left, second & WORD, ((first >> 32) & WORD) ^ d ^ right, first & WORD
        left, right = (left + 0x9E3779B9) & WORD, (right + 0xBB67AE85) & WORD
    return a, b, c, d


@dataclass(frozen=True)
class Truth:
    """What a call must return: float64 values by name (out, lse, and dq, dk, dv, dbias, dalibi_slopes, dsinks where asked for)."""

    call: Call
    values: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]  # of the tensors that a backend returns

    @property
    def out(self) -> Tensor:
        return self.values["out"]

    @property
    def lse(self) -> Tensor:
        return self.values["lse"]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, offset: int | Tensor | None = None, mask: Tensor | None = None,
    bias: Tensor | None = None, kv_lengths: Tensor | None = None, alibi_slopes: Tensor | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None, scale: float | None = None,
    dout: Tensor | None = None, dlse: Tensor | None = None,
) -> Truth:  # fmt: skip
    """The truth of `attention(q, k, v, ...)`, or with cu_seqlens of `attention_varlen`; gradients where dout or dlse is given."""
    left, right = window if window is not None else (None, None)
    starts_q = None if cu_seqlens_q is None else tuple(cu_seqlens_q.tolist())
    starts_k = starts_q if cu_seqlens_k is None else tuple(cu_seqlens_k.tolist())
    lse_shape = q.shape[:-1] if starts_q is None else (q.shape[1], q.shape[0])

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    def given(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=q.device) if tensor is None else tensor.detach().double()

    call = Call(
        q=q.detach().double(), k=k.detach().double(), v=v.detach().double(),
        dout=given(dout, (*q.shape[:-1], v.shape[-1])), dlse=given(dlse, lse_shape),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        left=left, right=0 if causal else right, offset=offset, mask=mask, bias=exact(bias), kv_lengths=kv_lengths,
        alibi_slopes=exact(alibi_slopes), softcap=softcap, sinks=exact(sinks), dropout_p=dropout_p,
        dropout_seed=(0, 0) if dropout_seed is None else (int(dropout_seed[0]), int(dropout_seed[1])), starts_q=starts_q, starts_k=starts_k,
    )  # fmt: skip
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    inputs = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dalibi_slopes": alibi_slopes, "dsinks": sinks}
    dtypes = {"out": q.dtype, "lse": lse_dtype} | {name: tensor.dtype for name, tensor in inputs.items() if tensor is not None}
    return Truth(call, _evaluate(call, dout is not None or dlse is not None), dtypes)


def _evaluate(call: Call, backward: bool) -> dict[str, Tensor]:
    values = {"out": torch.zeros_like(call.dout), "lse": torch.full_like(call.dlse, -math.inf)}
    if backward:
        inputs = {"dq": call.q, "dk": call.k, "dv": call.v, "dbias": call.bias, "dalibi_slopes": call.alibi_slopes, "dsinks": call.sinks}
        values |= {name: torch.zeros_like(tensor) for name, tensor in inputs.items() if tensor is not None}
    for member in range(call.batch):
        for index in range(call.heads):
            head = call.head(member, index, leaves=backward)
            call.queries(values["out"], member)[index] = head.out.detach()
            call.queries(values["lse"], member)[index] = head.lse.detach()
            if backward:
                _accumulate(call, values, member, index, head)
    if call.starts_q is not None and call.sinks is not None:
        values["lse"][:, call.unused] = call.sinks[:, None]
        if backward:
            values["dsinks"] += call.dlse[:, call.unused].sum(dim=1)
    return values


def _accumulate(call: Call, values: dict[str, Tensor], member: int, index: int, head: Head) -> None:
    """Adds what one head gives to every gradient."""
    seen = head.lse > -math.inf
    loss = (head.out * head.dout).sum() + (head.lse[seen] * head.dlse[seen]).sum()
    leaves = [leaf for leaf in (head.q, head.k, head.v, head.bias, head.slope, head.sink) if leaf is not None]
    gradients = iter(torch.autograd.grad(loss, leaves, materialize_grads=True))
    call.queries(values["dq"], member)[index] += next(gradients)
    call.keys(values["dk"], member)[index // call.group] += next(gradients)
    call.keys(values["dv"], member)[index // call.group] += next(gradients)
    if head.bias is not None:
        call.pairs(values["dbias"], member, index).add_(next(gradients))
    if head.slope is not None:
        call.slope(values["dalibi_slopes"], member, index).add_(next(gradients))
    if head.sink is not None:
        values["dsinks"][index] += next(gradients)
