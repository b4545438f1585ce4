"""Attention as functions: softmax(scale * q k^T) v with every option in any combination, on the backend that suits the call.

    pair (i, j) is visible iff  j < kv_lengths[b]  and  i + offset - left <= j <= i + offset + right  and  mask[b, h, i, j]

Source: Vaswani et al., "Attention is all you need", 2017; the fused form: Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import autocast, cpu_weights, jagged, reference
from .backend import Explanation, explanation
from .calls import call, call_for_out
from .problem import AttentionOutput
from .validation import check


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, fused: memory O(seqlen), differentiable in q, k, v, bias, alibi_slopes and sinks.

    A query that sees no key gives 0. No input is modified, and the host waits for no device.

    Args:
        q: (batch, heads, seqlen_q, head_dim), float16, bfloat16, float32 or float64, any strides. A jagged nested tensor
            (batch, heads, jagged, head_dim) is served as packed sequences and comes back jagged.
        k: (batch, kv_heads, seqlen_k, head_dim); heads is a multiple of kv_heads, query head h reads key head h // (heads // kv_heads).
        v: (batch, kv_heads, seqlen_k, head_dim_v).
        causal: a query sees no key after its own position; the same as window right 0.
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded.
        offset: query i stands at key i + offset. An int, or an int tensor (batch,). Default: the last query at the last key.
            0 aligns the first query with the first key, as PyTorch's is_causal does.
        mask: bool, True = may attend; (seqlen_q, seqlen_k), or 4-D with each size 1 or full.
        bias: floating, added to the scores; shapes as mask. -inf hides a pair.
        kv_lengths: int32 or int64, (batch,): how many keys are real; or (batch, 2): [start, end).
        alibi_slopes: (heads,) or (batch, heads); adds -slope * |i + offset - j| (Press et al., 2022).
        softcap: c > 0 replaces scores x by c * tanh(x / c) before ALiBi and bias (Gemma 2).
        sinks: (heads,), one more logit a head that has no value: probability that goes nowhere (Xiao et al., 2024).
        dropout_p: probability of dropping a weight; kept ones are divided by 1 - dropout_p.
        dropout_seed: int64 (2,) = (seed, offset) of the Philox generator on q's device; drawn from its default generator if None.
        scale: finite, 0 and negative included; default head_dim ** -0.5.
        backend: a name from `backends()`; None chooses (see `explain`).

    Returns:
        (batch, heads, seqlen_q, head_dim_v) in q's dtype, laid out as torch.empty_like(q) (`reference`: as it falls).

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence names it, what it got and what was expected.
        NotImplementedError: the demanded backend can't compute this call; the sentence says why.
    """
    if dropout_p is _NO_DROPOUT and _are_none(window, offset, mask, bias, kv_lengths, alibi_slopes, softcap, sinks, dropout_seed, scale):
        options: dict[str, Any] = {} if causal is False else {"causal": causal}  # a short call would notice a search through them all
    else:
        options = _options(locals())
    if not jagged.any_nested(q, k, v):
        return call_for_out(q, k, v, options, backend)
    rows, cu_seqlens = jagged.unpack(q, k, v, options)
    out = call_for_out(*rows, options | cu_seqlens, backend)
    return torch.nested.nested_tensor_from_jagged(out, cu_seqlens["cu_seqlens_q"]).transpose(1, 2)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """`attention`, and the log-sum-exp of each row's scores: (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64).

    Sinks are included; a row that sees nothing has -inf. Both results are differentiable. Arguments and errors are those of
    `attention`; nested tensors are refused.
    """
    return call(q, k, v, _options(locals()), backend)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    **rejected: Any,
) -> Tensor:
    """`attention` over sequences packed one after the other, each seeing itself alone.

    Args:
        q: (total_q, heads, head_dim); k: (total_k, kv_heads, head_dim); v: (total_k, kv_heads, head_dim_v).
        cu_seqlens_q: int32 or int64 (batch + 1,): member b has rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]; members may be empty,
            rows past the last give 0. Their values are never read by the host.
        cu_seqlens_k: the same for keys; default cu_seqlens_q.
        The other options are those of `attention`, (batch,) meaning one a member; offset and kv_lengths count inside each member.

    Returns:
        (total_q, heads, head_dim_v) in q's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as `attention`; mask and bias are refused, for packed pairs fill no rectangle.
    """
    jagged.reject(rejected)
    return call_for_out(q, k, v, _options(locals()) | {"packed": True}, backend)


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    **rejected: Any,
) -> AttentionOutput:
    """`attention_varlen`, and its lse (heads, total_q) as `attention_with_lse` has it; arguments and errors as there."""
    jagged.reject(rejected)
    return call(q, k, v, _options(locals()) | {"packed": True}, backend)


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    average_heads: bool = False,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    offset: int | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The probabilities that `attention` used, recomputed from its lse and the same options: exp(scores - lse), after dropout.

    Args:
        lse: (batch, heads, seqlen_q), from `attention_with_lse`.
        average_heads: the mean over heads instead of one matrix a head.
        dropout_seed: required with dropout_p > 0, the one the forward used.

    Returns:
        (batch, heads, seqlen_q, seqlen_k), or (batch, seqlen_q, seqlen_k), in q's dtype; differentiable in q, k, lse and the options.
        Rows of a query that sees nothing are 0; with sinks, rows sum to less than 1.

    Raises:
        ValueError, TypeError: as `attention`; also an lse of another shape, or dropout without its seed.
    """
    options = _options(locals())
    q, k = autocast.cast(q, k)
    problem = check(q, k, k, **options)
    if not isinstance(lse, Tensor) or not lse.is_floating_point() or lse.device != q.device:
        got = f"{lse.dtype} on {lse.device}" if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse is {got}, expected the floating tensor on {q.device} that attention_with_lse returned")
    if not isinstance(average_heads, bool):
        raise TypeError(f"average_heads is {average_heads!r}, expected True or False")
    if tuple(lse.shape) != tuple(q.shape[:3]):
        raise ValueError(f"lse has shape {tuple(lse.shape)}, expected (batch, heads, seqlen_q) = {tuple(q.shape[:3])}")
    if problem.dropout_p > 0 and dropout_seed is None:
        raise ValueError(f"dropout_p is {dropout_p}, dropout_seed is None: pass the forward's seed, else other weights are dropped")
    with autocast.off(q.device):
        if cpu_weights.computes(q, k, lse, problem):
            return cpu_weights.attention_weights(q, k, lse, problem, average_heads)
        weights = reference.attention_weights(q, k, lse, problem, average_heads)
    return weights.to(problem.dtype)


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, **options: Any) -> Explanation:
    """Which backend `attention(q, k, v, **options)` would take, and why not the others; nothing is run.

    Accepts every option of `attention`, and cu_seqlens_q, cu_seqlens_k of `attention_varlen`.
    """
    for name in options:
        if name not in _EXPLAINED:
            raise TypeError(
                f"explain() got an unexpected keyword argument {name!r}: it takes the options of attention and attention_varlen"
            )
    if jagged.any_nested(q, k, v):
        (q, k, v), cu_seqlens = jagged.unpack(q, k, v, options)
        options |= cu_seqlens
    q, k, v = autocast.cast(q, k, v)
    return explanation(check(q, k, v, **options), backend)


def warmup(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, **options: Any) -> str:
    """Compile and load whatever `attention(q, k, v, **options)` needs, before a CUDA graph is captured or a server takes requests.

    Runs the call once, and its backward if an input or option needs a gradient; results and gradients are dropped, the random
    generators stay as they are. Kernels are compiled for dtypes, head dims, which options there are, and which addresses, strides, lengths,
    offsets and windows are 1 or divide by 16: pass tensors like those to come, once for each such class. A decoding step and a longer run
    of queries are classes of their own, and so are more keys than the 512 of a split.

    Accepts every option of `attention`, and cu_seqlens_q, cu_seqlens_k of `attention_varlen`. Raises what these raise.

    Returns:
        The backend that ran.
    """
    chosen = explain(q, k, v, backend=backend, **options).backend
    if jagged.any_nested(q, k, v):
        (q, k, v), cu_seqlens = jagged.unpack(q, k, v, options)
        options |= cu_seqlens
    with torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
        if "cu_seqlens_q" in options:
            output = attention_varlen_with_lse(q, k, v, backend=chosen, **options)
        else:
            output = attention_with_lse(q, k, v, backend=chosen, **options)
        inputs = [x for x in (q, k, v, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
        if inputs and output.out.requires_grad:
            torch.autograd.grad(output.out, inputs, torch.zeros_like(output.out), allow_unused=True)
    return chosen


_EXPLAINED = frozenset(inspect.signature(check).parameters) - {"q", "k", "v", "packed"}


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among a public function's arguments that were given; what is the default itself was not."""
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and value is not _NO_DROPOUT and name not in _OPERANDS and not (value is False and name == "causal")
    }


def _are_none(*values: object) -> bool:
    for value in values:  # noqa: SIM110 (a loop takes half the time of any)
        if value is not None:
            return False
    return True


_NO_DROPOUT = inspect.signature(attention).parameters["dropout_p"].default
_OPERANDS = frozenset(("q", "k", "v", "lse", "average_heads", "backend", "rejected"))
