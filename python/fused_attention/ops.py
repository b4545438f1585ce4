"""The two registered operators, fused_attention::forward and ::backward: their schemas, fakes, derivatives and batching rules.

Every kernel backend runs behind them, so autograd, torch.compile and torch.func see one operator whoever computes it. The
derivative of backward, and forward-mode derivatives, come from blockwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import blockwise, second_derivative
from .backend import KERNELS, OUT_ALONE
from .batching import batched
from .listeners import unheard
from .problem import AttentionOutput, Gradients, Layout, Problem, empty_output

OPTIONS = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, Tensor? kv_lengths, Tensor? offsets, Tensor? dropout_seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? offset, SymInt? window_left, SymInt? window_right, float scale, "
    "float? softcap, float dropout_p, str backend"
)
GRADIENTS = "Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks"  # empty where not needed

library = torch.library.Library("fused_attention", "FRAGMENT")
library.define(f"forward(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor out, Tensor lse)")
library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {OPTIONS}, bool[] needed) -> ({GRADIENTS})"
)
forward_op = torch.ops.fused_attention.forward.default
backward_op = torch.ops.fused_attention.backward.default

Arguments = tuple[Any, ...]  # of forward_op; [3:] of it are the options
TENSORS = 12  # the arguments before the scalars


def run(q: Tensor, k: Tensor, v: Tensor, problem: Problem, backend: str, tensors: tuple[Tensor, ...]) -> AttentionOutput:
    """out and lse of a checked problem on a chosen kernel backend, under whatever transform is active; tensors: of the options."""
    if torch.compiler.is_compiling():
        return AttentionOutput(*forward_op(q, k, v, *_options(problem), backend))
    if not problem.gradients and unheard(q, k, v, *tensors):
        return KERNELS[backend].forward(q, k, v, problem)
    arguments = (q, k, v, *_options(problem), backend)
    if forward_ad._current_level >= 0 or _levels("Jvp") or _levels("Grad") > 1:
        return blockwise.forward(q, k, v, problem)
    if torch._C._are_functorch_transforms_active():
        return AttentionOutput(*TransformedAttention.apply(*arguments))  # type: ignore[no-untyped-call]
    return AttentionOutput(*forward_op(*arguments))


def run_for_out(q: Tensor, k: Tensor, v: Tensor, problem: Problem, backend: str, tensors: tuple[Tensor, ...]) -> Tensor:
    """The out of `run` alone; where nobody notices, a backend may leave lse away."""
    alone = OUT_ALONE.get(backend)
    if alone is None or problem.gradients or torch.compiler.is_compiling() or not unheard(q, k, v, *tensors):
        return run(q, k, v, problem, backend, tensors).out
    return alone(q, k, v, problem)


def _levels(kind: str) -> int:
    """How many torch.func transforms of a kind are active."""
    if not torch._C._are_functorch_transforms_active():
        return 0
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(interpreter.key().name == kind for interpreter in stack)


def _options(problem: Problem) -> Arguments:
    """The options in the schema's order; an offset is a tensor or a number."""
    offsets, offset = (problem.offset, None) if isinstance(problem.offset, Tensor) else (None, problem.offset)
    return (
        problem.bias,
        problem.alibi_slopes,
        problem.sinks,
        problem.mask,
        problem.kv_lengths,
        offsets,
        problem.dropout_seed,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        offset,
        problem.window_left,
        problem.window_right,
        problem.scale,
        problem.softcap,
        problem.dropout_p,
    )


def problem_of(q: Tensor, k: Tensor, v: Tensor, options: Arguments, gradients: frozenset[str] = frozenset()) -> Problem:
    """The inverse of _options, for the side behind the operator."""
    bias, slopes, sinks, mask, kv_lengths, offsets, seed, cu_q, cu_k, offset, left, right, scale, softcap, dropout_p = options
    return Problem(
        q=Layout.of(q),
        k=Layout.of(k),
        v=Layout.of(v),
        dtype=q.dtype,
        device=q.device,
        scale=scale,
        window_left=left,
        window_right=right,
        offset=offset if offsets is None else offsets,
        mask=mask,
        bias=bias,
        kv_lengths=kv_lengths,
        alibi_slopes=slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=seed,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        gradients=gradients,
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = KERNELS[options[-1]].forward(q, k, v, problem_of(q, k, v, options[:-1]))
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    *facts, backend, needed = options
    wanted = frozenset(name for name, need in zip(Gradients._fields, needed, strict=True) if need)
    problem = problem_of(q, k, v, tuple(facts), wanted)
    gradients = KERNELS[backend].backward(dout, dlse, q, k, v, out, lse, problem)
    likes = (q, k, v, problem.bias, problem.alibi_slopes, problem.sinks)
    return tuple(_as_fake(gradient, like, need) for gradient, like, need in zip(gradients, likes, needed, strict=True))


def _as_fake(gradient: Tensor | None, like: Tensor | None, need: bool) -> Tensor:
    """A gradient laid out as _fake_backward announces it."""
    if not need or like is None:
        return torch.empty(0)
    if gradient is None:
        raise RuntimeError("a backend left out a gradient that it was asked for")
    fake = torch.empty_like(like)
    return gradient if gradient.stride() == fake.stride() else fake.copy_(gradient)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    problem = problem_of(q, k, v, options[:-1])
    rows = (problem.heads, problem.seqlen_q) if problem.packed else (problem.batch, problem.heads, problem.seqlen_q)
    return empty_output(q, problem.head_dim_v), q.new_empty(rows, dtype=problem.accumulate_dtype)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    likes = (q, k, v, *options[:3])
    return tuple(torch.empty_like(like) if need else torch.empty(0) for like, need in zip(likes, options[-1], strict=True))


def _save_forward(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.scalars = inputs[TENSORS:]


def _save_backward(ctx: Any, inputs: Arguments, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: TENSORS + 4])
    ctx.scalars = inputs[TENSORS + 4 :]


def _differentiate_forward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, apply: Callable[..., tuple[Tensor, ...]]) -> Arguments:
    q, k, v, *options, out, lse = ctx.saved_tensors
    nothing = (None,) * (TENSORS - 6 + len(ctx.scalars))
    if dout is None and dlse is None:
        return (None,) * 6 + nothing
    needed = tuple(ctx.needs_input_grad[:6])
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = apply(dout, dlse, q, k, v, out, lse, *options, *ctx.scalars, needed)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)) + nothing


def _differentiate_backward(ctx: Any, *cotangents: Tensor | None) -> Arguments:
    dout, dlse, q, k, v, out, lse, *options = ctx.saved_tensors
    *scalars, _, needed = ctx.scalars
    given = Gradients(*(cotangent if need else None for cotangent, need in zip(cotangents, needed, strict=True)))
    if all(cotangent is None for cotangent in given):
        return (None,) * (TENSORS + 4 + len(ctx.scalars))
    found = second_derivative.double_backward(given, dout, dlse, q, k, v, out, lse, problem_of(q, k, v, (*options, *scalars)))
    return found + (None,) * (TENSORS + 4 + len(ctx.scalars) - len(found))


class Attention(torch.autograd.Function):
    """forward under plain autograd: the form with the least overhead a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, Tensor] = forward_op(*arguments)
        _save_forward(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Arguments:
        return _differentiate_forward(ctx, dout, dlse, backward_op)


class AttentionBackward(torch.autograd.Function):
    """backward under plain autograd, so that it can be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = backward_op(*arguments)
        _save_backward(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Arguments:
        return _differentiate_backward(ctx, *cotangents)


class TransformedAttention(torch.autograd.Function):
    """forward under torch.func.grad and vmap, which want the context apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return forward_op(*arguments)

    setup_context = staticmethod(_save_forward)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Arguments:
        return _differentiate_forward(ctx, dout, dlse, TransformedBackward.apply)


class TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return backward_op(*arguments)

    setup_context = staticmethod(_save_backward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Arguments:
        return _differentiate_backward(ctx, *cotangents)


def _gated(function: type[torch.autograd.Function], operator: Callable[..., Any], differentiable: slice) -> Callable[..., Any]:
    """The operator's Autograd kernel: record only what needs a gradient."""

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[differentiable]):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return kernel


def _forward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """2 (head_dim + head_dim_v) for every pair, visible or not, as PyTorch counts its own attention."""
    rows = q[0] * q[1] * (q[2] if len(q) == 4 else 1)
    return 2 * rows * k[-3 if len(k) == 3 else -2] * (q[-1] + v[-1])


def _backward_flops(dout: Any, dlse: Any, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    return _forward_flops(q, k, v) * 5 // 2


library.impl("forward", _forward, "CompositeExplicitAutograd")
library.impl("backward", _backward, "CompositeExplicitAutograd")
library.impl("forward", _gated(Attention, forward_op, slice(0, 6)), "Autograd")
library.impl("backward", _gated(AttentionBackward, backward_op, slice(0, 10)), "Autograd")
torch.library.register_fake("fused_attention::forward", _fake_forward, lib=library)
torch.library.register_fake("fused_attention::backward", _fake_backward, lib=library)
torch.library.register_vmap("fused_attention::forward", batched(forward_op, 3), lib=library)
torch.library.register_vmap("fused_attention::backward", batched(backward_op, 7), lib=library)
register_flop_formula(forward_op.overloadpacket)(_forward_flops)
register_flop_formula(backward_op.overloadpacket)(_backward_flops)
