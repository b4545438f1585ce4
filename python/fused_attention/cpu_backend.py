"""The C++ kernels for CPUs: every type and option, forward and backward, on the vectors of whatever instruction set the machine has.

The compiled module takes addresses and strides, so that it needs no torch to build, and copies no tensor. It computes in
base 2, with two limits in float32. Finite biases beyond 2.0e38 count as 2.0e38, finite sinks and scales beyond 2.3e38 as 2.3e38,
and lse is that of these numbers. And lse is rounded, so that the backward pass has weights off by a factor of exp(|lse| / 1.6e7),
though never above 1: of a row with an lse near 1e7 or beyond, however it came about, the gradients are no more than finite.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .built import build_reason
from .cpu_arguments import Arguments, pairs_view, view
from .problem import AttentionOutput, Gradients, Known, Problem, empty_output, empty_results

VECTOR = 16  # float32 numbers in the widest one
PARTIAL_SUMS = 1024


class CpuBackend:
    name = "cpu"

    def unavailable(self) -> str | None:
        return _unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"q is on {problem.device}, and the cpu backend computes on CPU tensors"
        return None

    def slower(self, problem: Problem) -> str | None:
        ragged = problem.head_dim % VECTOR or problem.head_dim_v % VECTOR
        single = problem.seqlen_q * problem.group == 1 and not problem.hides and not problem.gradients
        if single and ragged and problem.dtype is torch.float32:
            return f"a single query with rows of no whole vectors of {VECTOR} fills one lane, and PyTorch's own kernel is faster there"
        if _is_baseline():
            return "of this CPU's instruction sets only the baseline is known here, and PyTorch's own kernels use more of it"
        if problem.dtype is torch.bfloat16 and _multiplies_tiles() and problem.seqlen_q > 1 and _is_plain(problem):
            return "this CPU multiplies tiles of bfloat16 (AMX), which PyTorch's own kernel uses and the cpu backend does not"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        out, lse = empty_results(q, problem)
        again = _prepared(q, k, v, problem)
        if again is None:
            call = Arguments(q, k, v, out, lse, problem)
            _module().forward(call.tensors, call.sizes, call.visible, call.options, threads())
        else:
            again.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), threads())
        return AttentionOutput(out, lse)

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        wanted = problem.gradients
        # Rows of no member and keys that no head reads have a gradient of 0, and nobody would write it.
        new = torch.empty_like if problem.heads and not problem.packed else torch.zeros_like
        shared = problem.accumulate_dtype if problem.group > 1 else problem.dtype  # the heads of a group add up
        dq = new(q) if "q" in wanted else None
        dk, dv = (new(x, dtype=shared) if name in wanted else None for name, x in (("k", k), ("v", v)))
        dbias = _zeros(problem.bias, problem) if "bias" in wanted else None
        dslopes = q.new_zeros((problem.batch, problem.heads), dtype=lse.dtype) if "alibi_slopes" in wanted else None
        delta = (torch.zeros_like(lse) if dlse is None else -dlse) if "sinks" in wanted else None
        call = Arguments(q, k, v, out, lse, problem)
        gradients = (
            *(view(dout), _address(dlse), view(dq), view(dk), view(dv)),
            *(pairs_view(dbias), _address(dslopes), _address(delta)),
        )
        _module().backward(call.tensors, call.sizes, call.visible, call.options, threads(), gradients)
        return Gradients(
            dq,
            None if dk is None else dk.to(k.dtype),
            None if dv is None else dv.to(v.dtype),
            bias=None if dbias is None or problem.bias is None else dbias.to(problem.bias.dtype),
            alibi_slopes=_slope_gradient(dslopes, problem.alibi_slopes),
            sinks=_sink_gradient(problem.sinks, lse, delta),
        )


def out_alone(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """The out of forward, where nobody needs lse: of a problem that comes again, it is not allocated."""
    again = _prepared(q, k, v, problem)
    if again is None:
        return CpuBackend().forward(q, k, v, problem).out
    out = torch.empty_like(q) if again.like_q else empty_output(q, problem.head_dim_v)
    again.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, threads())
    return out


class Prepared(NamedTuple):
    """A call of forward that lacks nothing but its addresses."""

    run: Callable[[int, int, int, int, int, int], None]  # on those of q, k, v, out and lse, 0 for none, and so many threads
    like_q: bool  # out


def _prepared(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Prepared | None:
    """What follows from the facts of a problem that comes again, made once."""
    if not isinstance(problem, Known) or problem.notes is None:
        return None
    known: Prepared | None = problem.notes.get("cpu")
    if known is None:
        call = Arguments(q, k, v, *empty_results(q, problem), problem)
        run = _module().prepare(call.tensors, call.sizes, call.visible, call.options)
        problem.notes["cpu"] = known = Prepared(run, problem.head_dim == problem.head_dim_v)
    return known


def _zeros(bias: Tensor | None, problem: Problem) -> Tensor | None:
    """Where the heads add up the gradient of a bias: dense, and as precise as they are."""
    return None if bias is None else torch.zeros(bias.shape, dtype=problem.accumulate_dtype)


def _slope_gradient(by_member: Tensor | None, slopes: Tensor | None) -> Tensor | None:
    if by_member is None or slopes is None:
        return None
    return (by_member if slopes.dim() == 2 else _sum_rows(by_member)).to(slopes.dtype)


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor | None) -> Tensor | None:
    """The sink's probability times (0 - delta), summed over its head: it has no value row."""
    if sinks is None or delta is None:
        return None
    # No probability is above 1, however lse was rounded.
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp((sinks.to(lse.dtype)[:, None] - lse).clamp(max=0.0)))
    return -_sum_rows((weights * delta).transpose(-2, -1).reshape(-1, sinks.shape[0])).to(sinks.dtype)


def _sum_rows(x: Tensor) -> Tensor:
    """The sum over the rows of a matrix, in an order that no number of threads changes: PyTorch splits a large sum with one result."""
    padded: Tensor = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % PARTIAL_SUMS))
    return padded.reshape(padded.shape[0] // PARTIAL_SUMS, PARTIAL_SUMS, x.shape[1]).sum(0).sum(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _module() -> ModuleType:
    from . import _cpu

    return _cpu


def _is_plain(problem: Problem) -> bool:
    """Whether PyTorch's fused kernel computes it too: without an option that is a tensor or bends the scores, and no window to the left."""
    changes = (problem.window_left, problem.softcap, problem.dropout_seed, problem.alibi_slopes, problem.sinks, problem.cu_seqlens_q)
    return all(x is None for x in (*changes, problem.mask, problem.bias, problem.kv_lengths))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler can't trace into compiled modules
def _is_baseline() -> bool:
    return _unavailable() is None and _module().isa() == "baseline"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler can't trace into compiled modules
def _multiplies_tiles() -> bool:
    """Whether this CPU has AMX, and the system lets processes use it; False where PyTorch does not say."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


@functools.cache
def _unavailable() -> str | None:
    try:
        from . import _cpu

        _cpu.isa()
    except RuntimeError as error:  # an instruction set that this CPU does not have was asked for
        return str(error)
    except ImportError as error:
        reason = build_reason("cpu") or str(error)
        return (
            f"the compiled module fused_attention._cpu is missing: {reason} (install fused-attention again where there is a C++ compiler)"
        )
    return None


def threads() -> int:
    """How many a kernel may use."""
    return 1 if _is_forked else torch.get_num_threads()


def _leave_the_pool() -> None:
    global _is_forked
    _is_forked = True


# A forked child inherits OpenMP's pool without its threads, and would wait for them for ever.
_is_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_pool)
