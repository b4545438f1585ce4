"""The backend that needs PyTorch alone: its fused CPU attention where that means exactly the same, else tiles in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, blockwise
from .problem import AttentionOutput, Gradients, Problem, empty_output

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
            if fused(problem):
                out, lse = _fused_forward(q, k, v, 0.0, False, attn_mask=None, scale=problem.scale)
            else:
                out, lse = blockwise.forward(q, k, v, problem)
        lse = lse.to(problem.accumulate_dtype).contiguous()
        return AttentionOutput(empty_output(q, problem.head_dim_v).copy_(out), lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        with autocast.off(q.device):
            if fused(problem) and dlse is None:
                gradients = Gradients(*_fused_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=None, scale=problem.scale))
            else:
                gradients = blockwise.backward(dout, dlse, q, k, v, out, lse, problem)
        return gradients


def fused(problem: Problem) -> bool:
    """Whether PyTorch's fused CPU kernel means exactly the same.

    It lets a hidden key that is not finite reach other rows, and reads rows as if their last stride were 1: it serves only
    where nothing is hidden and rows are plain.
    """
    extras = (problem.alibi_slopes, problem.softcap, problem.sinks, problem.dropout_seed)
    plain = not problem.hides and all(extra is None for extra in extras)
    rows = all(layout.stride[-1] == 1 and 0 not in layout.shape for layout in (problem.q, problem.k, problem.v))
    return plain and rows and problem.device.type == "cpu" and problem.group == 1 and problem.head_dim == problem.head_dim_v
