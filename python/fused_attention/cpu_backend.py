"""The C++ kernels for CPUs: float32, forward and backward, on the vectors of whatever instruction set the machine has.

The compiled module takes addresses and strides, so that it needs no torch to build, and copies no tensor.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .problem import AttentionOutput, Gradients, Problem, empty_output

# A forked child inherits OpenMP's pool without its threads, and would wait for them for ever.
_PROCESS = os.getpid()
_FAR = 2**61  # windows and offsets beyond it can be cut to it; int64 holds it
_UNBOUNDED = -1

View = tuple[int, ...]  # address and strides
NOTHING: View = (0, 0, 0, 0, 0)


class CpuBackend:
    name = "cpu"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"q is on {problem.device}, and the cpu backend computes on CPU tensors"
        if problem.dtype is not torch.float32:
            return f"q is {problem.dtype}, and the cpu backend computes torch.float32 only"
        if problem.packed:
            return "cu_seqlens_q is given, and the cpu backend does not take packed sequences"
        absent = {
            "mask": problem.mask,
            "bias": problem.bias,
            "alibi_slopes": problem.alibi_slopes,
            "softcap": problem.softcap,
            "sinks": problem.sinks,
            "dropout_p": problem.dropout_p or None,
        }
        given = next((name for name, value in absent.items() if value is not None), None)
        return f"{given} is given, and the cpu backend has no kernel for it" if given else None

    def slower(self, problem: Problem) -> str | None:
        if problem.seqlen_q * problem.group == 1 and not problem.hides and not problem.gradients:
            return "a single query fills one lane of a vector, and PyTorch's own kernel is faster there"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        from . import _cpu

        out = empty_output(q, problem.head_dim_v)
        lse = q.new_empty(q.shape[:3])
        visible, _keep = _visible(problem)
        _cpu.forward(_view(q), _view(k), _view(v), _view(out), lse.data_ptr(), _sizes(problem), visible, problem.scale, _threads())
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        from . import _cpu

        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        # The gradient of a key that no head reads is 0, and nobody would write it.
        new = torch.empty_like if problem.heads else torch.zeros_like
        dq, dk, dv = (new(x) if name in problem.gradients else None for name, x in (("q", q), ("k", k), ("v", v)))
        visible, _keep = _visible(problem)
        _cpu.backward(
            *(_view(q), _view(k), _view(v), _view(out), lse.data_ptr(), _sizes(problem), visible, problem.scale, _threads()),
            *(_view(dout), 0 if dlse is None else dlse.data_ptr(), _view(dq), _view(dk), _view(dv)),
        )
        return Gradients(dq, dk, dv)


@functools.cache
def _unavailable() -> str | None:
    try:
        from . import _cpu

        _cpu.isa()
    except RuntimeError as error:  # an instruction set that this CPU does not have was asked for
        return str(error)
    except ImportError as error:
        reason = _build_reason() or str(error)
        return (
            f"the compiled module fused_attention._cpu is missing: {reason} (install fused-attention again where there is a C++ compiler)"
        )
    return None


def _build_reason() -> str | None:
    """Why the build left the module out, if it says."""
    try:
        from ._build_info import REASONS
    except ImportError:
        return None
    reason: str | None = REASONS.get("cpu")
    return reason


def _threads() -> int:
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1


def _view(tensor: Tensor | None) -> View:
    return NOTHING if tensor is None else (tensor.data_ptr(), *tensor.stride())


def _sizes(problem: Problem) -> tuple[int, ...]:
    (batch, heads, seqlen_q, head_dim), (_, kv_heads, seqlen_k, head_dim_v) = problem.q.shape, problem.v.shape
    return batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v


def _visible(problem: Problem) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """What the kernels take for window, kv_lengths and offset, and the tensors that must outlive the call."""
    left, right = (_UNBOUNDED if x is None else min(x, _FAR) for x in (problem.window_left, problem.window_right))
    lengths = None if problem.kv_lengths is None else problem.kv_lengths.to(torch.int64).contiguous()
    starts, ends, stride = 0, 0, 0
    if lengths is not None:
        stride = lengths.dim()
        ends = lengths.data_ptr()
        if stride == 2:
            starts, ends = ends, ends + lengths.element_size()
    if isinstance(problem.offset, Tensor):
        offsets = problem.offset.to(torch.int64).contiguous()
        return (left, right, starts, ends, stride, offsets.data_ptr(), 0, 0), (lengths, offsets)
    offset = max(-_FAR, min(problem.offset or 0, _FAR))
    return (left, right, starts, ends, stride, 0, offset, int(problem.offset is not None)), (lengths,)
