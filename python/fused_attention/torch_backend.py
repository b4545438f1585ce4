"""The backend that needs PyTorch alone: its fused CPU attention where that means exactly the same, else tiles in plain PyTorch."""

from __future__ import annotations

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
            if fused(problem) and _contained(k, v, problem):
                out, lse = _fused_forward(q, k, v, 0.0, problem.hides, attn_mask=None, scale=problem.scale)
            else:
                out, lse = blockwise.forward(q, k, v, problem)
        lse = lse.to(problem.accumulate_dtype).contiguous()
        # An empty tensor is called contiguous whatever its strides.
        if not (q.is_contiguous() and out.is_contiguous() and out.numel() > 0):
            out = empty_output(q, problem.head_dim_v).copy_(out)
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        with autocast.off(q.device):
            if fused(problem) and dlse is None and _contained(k, v, problem):
                found = _fused_backward(dout, q, k, v, out, lse, 0.0, problem.hides, attn_mask=None, scale=problem.scale)
                return Gradients(*found)
            return blockwise.backward(dout, dlse, q, k, v, out, lse, problem)


def fused(problem: Problem) -> bool:
    """Whether PyTorch's fused CPU kernel computes the problem: nothing hidden, or causal from the first key on.

    It reads rows as if their last stride were 1, and takes keys and values of one width.
    """
    extras = (problem.alibi_slopes, problem.softcap, problem.sinks, problem.dropout_seed)
    plain = all(extra is None for extra in extras) and (not problem.hides or _causal_from_the_first_key(problem))
    rows = all(layout.stride[-1] == 1 and 0 not in layout.shape for layout in (problem.q, problem.k, problem.v))
    return plain and rows and problem.device.type == "cpu" and problem.group == 1 and problem.head_dim == problem.head_dim_v


def _causal_from_the_first_key(problem: Problem) -> bool:
    others = (problem.window_left, problem.mask, problem.bias, problem.kv_lengths, problem.cu_seqlens_q)
    return problem.window_right == 0 and static_offset(problem) == 0 and all(other is None for other in others)


def _contained(k: Tensor, v: Tensor, problem: Problem) -> bool:
    """Whether no key that is hidden from a query can spoil it: the fused kernel gives such a key weight 0, and 0 * nan is nan."""
    return not problem.hides or bool(torch.isfinite(k).all() and torch.isfinite(v).all())
