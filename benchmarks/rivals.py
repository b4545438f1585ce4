"""Who is timed beside ours on a GPU: each fused kernel of torch's scaled_dot_product_attention, compiled flex_attention, varlen_attn.

A rival is given each problem in the form that suits it best: is_causal rather than a mask, a block mask that skips, jagged nested tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .contenders import OURS, Contender, Run, ours
from .workloads import AttentionInputs, Workload

LARGEST_MATH = 2**31  # scores that the unfused backend may hold at once: 4 GiB in 16 bits, and it holds several
FLEX = "flex"


def sdpa(inputs: AttentionInputs, backend: SDPBackend | None) -> Run:
    """scaled_dot_product_attention on one backend alone, or on its own choice; backward runs on the backend of the forward call."""
    workload = inputs.workload
    if workload.softcap is not None:
        raise NotImplementedError("scaled_dot_product_attention has no softcap")
    if backend is SDPBackend.MATH and workload.batch * workload.heads * workload.seqlen_q * workload.seqlen_k > LARGEST_MATH:
        raise NotImplementedError("the scores do not fit in memory")
    if workload.lengths is not None:
        return _sdpa_of_nested(inputs, backend)
    causal = workload.causal and not workload.cross and workload.kv_lengths is None and workload.window is None and not workload.bias
    mask = None if causal else _added_mask(inputs)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask, is_causal=causal, enable_gqa=workload.group > 1)

    return Run(forward=_on(backend, forward), leaves=inputs.leaves, dout=inputs.dout)


def _on(backend: SDPBackend | None, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def restricted() -> Tensor:
        with sdpa_kernel(backend or []):
            return forward()

    return forward if backend is None else restricted


def _added_mask(inputs: AttentionInputs) -> Tensor | None:
    """What hides or is added, as one tensor; a single query that sees all keys needs none."""
    bias: Tensor | None = inputs.options.get("bias")
    visible = inputs.visible
    if bias is not None and visible is not None:
        raise NotImplementedError("a bias and a mask at once would have to be added up first")
    if bias is not None:
        return bias
    return None if inputs.workload.seqlen_q == 1 and inputs.workload.kv_lengths is None and inputs.workload.window is None else visible


def _sdpa_of_nested(inputs: AttentionInputs, backend: SDPBackend | None) -> Run:
    lengths, offsets = inputs.workload.lengths or (), inputs.options["cu_seqlens_q"].long()

    def nested(packed: Tensor) -> Tensor:
        # The host knows the lengths: without them every call would wait for the device.
        jagged = torch.nested.nested_tensor_from_jagged(packed, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
        return jagged.transpose(1, 2)

    def forward() -> Tensor:
        q, k, v = nested(inputs.q), nested(inputs.k), nested(inputs.v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=inputs.workload.causal, enable_gqa=inputs.workload.group > 1)
        values: Tensor = out.transpose(1, 2).values()
        return values

    return Run(forward=_on(backend, forward), leaves=inputs.leaves, dout=inputs.dout)


def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return function


def flex(inputs: AttentionInputs, function: Callable[..., Any] | None = None, *, compiled: bool = True) -> Run:
    """flex_attention with a block mask, which skips what is hidden; uncompiled it only shows that the formulation is right.

    function: a compiled_flex that few workloads share, instead of one that is made here.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    workload = inputs.workload
    if function is None and compiled:
        # Each workload compiles anew: torch gives up, and goes uncompiled, once one function has been compiled for a few shapes.
        torch._dynamo.reset()
        function = compiled_flex()
    function = function or flex_attention
    hides = workload.causal or workload.window is not None or workload.kv_lengths is not None or workload.lengths is not None
    block_mask = None
    if hides and workload.seqlen_q > 1:
        members = workload.batch if workload.kv_lengths is not None else None
        block_mask = create_block_mask(_mask_mod(inputs), members, None, workload.seqlen_q, workload.seqlen_k, device=inputs.q.device)
    packed, score_mod = workload.lengths is not None, _score_mod(inputs)

    def forward() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] if packed else x for x in (inputs.q, inputs.k, inputs.v))
        out: Tensor = function(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=workload.group > 1)
        return out[0].transpose(0, 1) if packed else out

    return Run(forward=forward, leaves=inputs.leaves, dout=inputs.dout)


def _mask_mod(inputs: AttentionInputs) -> Callable[..., Tensor]:
    workload, device = inputs.workload, inputs.q.device
    shift = workload.seqlen_k - workload.seqlen_q
    ends = inputs.options.get("kv_lengths")
    member = None
    if workload.lengths is not None:
        lengths = torch.tensor(workload.lengths, device=device)
        member = torch.repeat_interleave(torch.arange(len(workload.lengths), device=device), lengths)

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = column >= 0
        if workload.causal:
            seen = seen & (column <= row + shift)
        if workload.window is not None:
            seen = seen & (column >= row + shift - workload.window)
        if ends is not None:
            seen = seen & (column < ends[batch])
        return seen if member is None else seen & (member[row] == member[column])

    return visible


def _score_mod(inputs: AttentionInputs) -> Callable[..., Tensor] | None:
    bias, softcap = inputs.options.get("bias"), inputs.workload.softcap
    if bias is None and softcap is None:
        return None

    def scored(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[0, head, row, column]

    return scored


def varlen(inputs: AttentionInputs) -> Run:
    """torch.nn.attention.varlen, packed sequences on FlashAttention-2."""
    from torch.nn.attention import varlen as packed

    workload, lengths = inputs.workload, inputs.workload.lengths or ()
    # Its way to say causal changed between torch 2.10 and 2.12.
    known = inspect.signature(packed.varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    options = (causal if workload.causal else {}) | ({"enable_gqa": True} if workload.group > 1 and "enable_gqa" in known else {})
    longest, starts = max(lengths), inputs.options["cu_seqlens_q"]

    def forward() -> Tensor:
        out = packed.varlen_attn(inputs.q, inputs.k, inputs.v, starts, starts, longest, longest, **options)
        return cast(Tensor, out)  # with return_aux it would be a tuple

    return Run(forward=forward, leaves=inputs.leaves, dout=inputs.dout)


# Where Triton can't serve; it refuses where no installation and no step of the GPU run has compiled it.
CUDA = Contender("ours, cuda", "attention", functools.partial(ours, backend="cuda"))


def device_contenders(workload: Workload, *, compiled: bool = True) -> tuple[Contender, ...]:
    """Ours first, of Triton and of CUDA C++; varlen_attn only where sequences are packed."""
    backends = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return (
        Contender(OURS, "attention", ours, ours=True),
        CUDA,
        *(Contender(name, "attention", functools.partial(sdpa, backend=backend)) for name, backend in backends.items()),
        Contender(FLEX, "attention", functools.partial(flex, compiled=compiled)),
        *((Contender("varlen", "attention", varlen),) if workload.lengths is not None else ()),
    )


def host_contenders(*, compiled: bool = True) -> tuple[Contender, ...]:
    """For what a call costs the host: torch's function as users call it, for the context that names a backend costs more than the call."""
    return (
        Contender(OURS, "attention", ours, ours=True),
        CUDA,
        Contender("SDPA", "attention", functools.partial(sdpa, backend=None)),
        Contender(FLEX, "attention", functools.partial(flex, compiled=compiled)),
    )
