"""The probabilities of attention on CPUs, or their mean over the heads, in one pass over tiles; their gradients from the definition.

weights = dropout exp(scores - lse)

so that the mean needs no matrix a head, and neither does a training step that never uses the gradient of its weights. What is traced or
transformed is for the definition in reference.py alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autocast, reference
from .cpu_arguments import Arguments
from .cpu_backend import CpuBackend, threads
from .listeners import unheard
from .problem import Problem

# A row's weights are off by the rounding of its lse, here up to a factor of 1 + 2^-18; the definition divides by their sum instead.
LARGEST_LSE = 64.0
OPTIONS = Problem._fields.index("window_left")
DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")


def computes(q: Tensor, k: Tensor, lse: Tensor, problem: Problem) -> bool:
    """Whether these weights are the kernel's to compute: nobody traces or transforms them, and every lse has digits enough."""
    if problem.device.type != "cpu" or torch.compiler.is_compiling() or CpuBackend().unavailable() is not None:
        return False
    if not unheard(q, k, lse, *problem[OPTIONS:]):
        return False
    # -inf is the lse of a query that sees nothing; a NaN fails the comparison.
    known = lse.detach()
    return bool((known.masked_fill(known == -torch.inf, 0.0).abs() <= LARGEST_LSE).all())


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, problem: Problem, average_heads: bool) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k), or without heads their mean, in q's dtype."""
    if problem.gradients or (torch.is_grad_enabled() and lse.requires_grad):
        weights: Tensor = Weights.apply(q, k, lse, *(getattr(problem, name) for name in DIFFERENTIABLE), problem, average_heads)  # type: ignore[no-untyped-call]
        return weights
    return _compute(q, k, lse, problem, average_heads)


class Weights(torch.autograd.Function):
    """The kernel's weights; whoever uses their gradient pays for the definition, in backward and beyond."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        *_, problem, ctx.average_heads = rest
        ctx.names = [name for name, value in zip(Problem._fields, problem, strict=True) if isinstance(value, Tensor)]
        ctx.problem = problem._replace(**dict.fromkeys(ctx.names))
        ctx.save_for_backward(q, k, lse, *(getattr(problem, name) for name in ctx.names))
        return _compute(q, k, lse, problem, ctx.average_heads)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # for a derivative of this one
        with torch.enable_grad(), autocast.off(dweights.device):
            # Views, for lse is a function of q and k, and its derivative is not this one's to take.
            q, k, lse, *tensors = (x.view_as(x) for x in ctx.saved_tensors)
            options = dict(zip(ctx.names, tensors, strict=True))
            inputs = (q, k, lse, *(options.get(name) for name in DIFFERENTIABLE))
            wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            weights = reference.attention_weights(q, k, lse, ctx.problem._replace(**options), ctx.average_heads)
            found = iter(torch.autograd.grad(weights, wanted, dweights.to(weights.dtype), create_graph=again, materialize_grads=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[: len(inputs)]), None, None


def _compute(q: Tensor, k: Tensor, lse: Tensor, problem: Problem, average_heads: bool) -> Tensor:
    from . import _cpu

    weights = q.new_empty(problem.batch, 1 if average_heads else problem.heads, problem.seqlen_q, problem.seqlen_k)
    lse = lse.detach().to(problem.accumulate_dtype).contiguous()
    call = Arguments(q, k, k, weights, lse, problem)
    _cpu.weights(call.tensors, call.sizes, call.visible, call.options, threads(), average_heads)
    return weights.squeeze(1) if average_heads else weights
