"""The backend that needs PyTorch alone: its fused CPU attention where that means exactly the same, else tiles in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast, blockwise
from .problem import AttentionOutput, Gradients, Problem, empty_output
from .scores import static_offset

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TorchBackend:
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def slower(self, problem: Problem) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        with autocast.off(q.device):
            call = _fused_call(k, v, problem)
            if call is None:
                out, lse = blockwise.forward(q, k, v, problem)
            else:
                out, lse = _fused_forward(q, k, v, 0.0, call.causal, attn_mask=call.mask, scale=problem.scale)
        lse = lse.to(problem.accumulate_dtype).contiguous()
        # An empty tensor is called contiguous whatever its strides.
        if not (q.is_contiguous() and out.is_contiguous() and out.numel() > 0):
            out = empty_output(q, problem.head_dim_v).copy_(out)
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        with autocast.off(q.device):
            call = _fused_call(k, v, problem) if dlse is None else None
            if call is None:
                return blockwise.backward(dout, dlse, q, k, v, out, lse, problem)
            found = _fused_backward(dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=call.mask, scale=problem.scale)
            return Gradients(*found)


class _FusedCall(NamedTuple):
    """What PyTorch's fused CPU kernel is told to hide."""

    causal: bool
    mask: Tensor | None  # added to the scores, (batch or 1, heads or 1, 1, seqlen_k)


def _fused_call(k: Tensor, v: Tensor, problem: Problem) -> _FusedCall | None:
    """How PyTorch's fused CPU kernel computes the same, or None.

    It reads rows as if their last stride were 1 and takes keys and values of one width. A hidden key has weight 0 there, and
    0 * nan is nan, so whatever is hidden must be finite; on a CPU the host can look.
    """
    extras = (problem.bias, problem.alibi_slopes, problem.softcap, problem.sinks, problem.dropout_seed, problem.cu_seqlens_q)
    rows = all(layout.stride[-1] == 1 and 0 not in layout.shape for layout in (problem.q, problem.k, problem.v))
    plain = all(extra is None for extra in extras) and problem.group == 1 and problem.head_dim == problem.head_dim_v
    if not (plain and rows and problem.device.type == "cpu"):
        return None
    if not problem.hides:
        return _FusedCall(causal=False, mask=None)
    if not bool(torch.isfinite(k).all() and torch.isfinite(v).all()):
        return None
    if problem.window_left is None and problem.kv_lengths is None:
        if problem.window_right is None and problem.mask is not None:
            return _key_mask_call(problem.mask, problem)
        causal = problem.window_right == 0 and static_offset(problem) == 0 and problem.mask is None  # from the first key on
        if causal and problem.scale > 0:  # it hides before it scales: -inf times what is not positive is inf or nan
            return _FusedCall(causal=True, mask=None)
    return None


def _key_mask_call(mask: Tensor, problem: Problem) -> _FusedCall | None:
    """A mask of keys alone, that leaves some to every member: a larger one would be copied as floats, a row of none has no lse there."""
    if mask.dim() != 4 or mask.shape[2] != 1 or not bool(mask.any(-1).all()):
        return None
    return _FusedCall(causal=False, mask=torch.zeros(mask.shape, dtype=problem.dtype).masked_fill_(~mask, -torch.inf))
