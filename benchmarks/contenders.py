"""Who is timed: ours, the naive form, torch's fused function, and the modules of torch.nn beside ours.

a contender   workload inputs -> Run (a call to time, the leaves of its gradients), or the sentence why it cannot run them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attention

from .workloads import AttentionInputs, Direction, Kind, ModuleInputs, Workload, feedforward_dim

OURS = "fused-attention"
NAIVE = "naive"


@dataclass(frozen=True)
class Run:
    """One contender on one workload, ready to be timed."""

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]  # by the name of their gradient
    dout: Tensor
    lse: Callable[[], Tensor] | None = None
    module: nn.Module | None = None
    backend: str | None = None

    def enter(self, direction: Direction) -> None:
        """Puts a module into the mode users run it in: torch's inference shortcut needs eval."""
        if self.module is not None:
            self.module.train(direction == "backward")


@dataclass(frozen=True)
class Contender:
    """A named implementation; `prepare` raises NotImplementedError with a sentence where it cannot run the inputs."""

    name: str
    kind: Kind
    prepare: Callable[..., Run]
    ours: bool = field(default=False)


def contenders(kind: Kind) -> tuple[Contender, ...]:
    return tuple(contender for contender in CONTENDERS if contender.kind == kind)


def ours(inputs: AttentionInputs, backend: str | None = None) -> Run:
    q, k, v, options = inputs.q, inputs.k, inputs.v, inputs.options | ({} if backend is None else {"backend": backend})
    call: Callable[..., Tensor] = fused_attention.attention
    call_with_lse: Callable[..., fused_attention.AttentionOutput] = fused_attention.attention_with_lse
    if inputs.workload.lengths is not None:
        call, call_with_lse = fused_attention.attention_varlen, fused_attention.attention_varlen_with_lse
    return Run(
        forward=lambda: call(q, k, v, **options),
        leaves=inputs.leaves,
        dout=inputs.dout,
        lse=lambda: call_with_lse(q, k, v, **options).lse,
        backend=fused_attention.explain(q, k, v, **options).backend,
    )


def _naive(inputs: AttentionInputs) -> Run:
    return Run(forward=lambda: naive_attention(inputs.q, inputs.k, inputs.v, inputs.visible), leaves=inputs.leaves, dout=inputs.dout)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v, one operation of torch after the other; q (batch, heads, seqlen_q, head_dim)."""
    kv_heads, group, seqlen_q = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    # The query heads of a group become rows of one product: repeating k and v for them would cost more than all the rest.
    rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
    scores = ((rows @ k.mT) * q.shape[-1] ** -0.5).unflatten(2, (group, seqlen_q))
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -math.inf)
    out: Tensor = torch.softmax(scores, dim=-1).flatten(2, 3) @ v
    return out.reshape(q.shape[:-1] + v.shape[-1:])


def _sdpa(inputs: AttentionInputs) -> Run:
    workload = inputs.workload
    # A mask would only slow it down: is_causal says the same where the lengths are equal.
    causal = workload.causal and not workload.cross and workload.kv_lengths is None

    def forward() -> Tensor:
        mask = None if causal else inputs.visible
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, mask, is_causal=causal, enable_gqa=workload.group > 1)

    return Run(forward=forward, leaves=inputs.leaves, dout=inputs.dout)


def torch_module(workload: Workload, dtype: torch.dtype, seed: int) -> nn.Module:
    """The module of torch.nn that the workload sits in, with weights of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(workload, nn.TransformerEncoderLayer, nn.MultiheadAttention).to(dtype)


def our_module(workload: Workload, dtype: torch.dtype, weights: nn.Module) -> nn.Module:
    module = _build(workload, fused_attention.TransformerLayer, fused_attention.MultiHeadAttention).to(dtype)
    module.load_state_dict(weights.state_dict())
    return module


def _build(
    workload: Workload, layer: Callable[..., nn.TransformerEncoderLayer], attention: Callable[..., nn.MultiheadAttention]
) -> nn.TransformerEncoderLayer | nn.MultiheadAttention:
    if workload.module == "layer":
        width = feedforward_dim(workload)
        return layer(
            workload.embed_dim, workload.heads, width, dropout=0.0, activation="gelu", batch_first=True, norm_first=workload.norm_first
        )
    if workload.module == "attention":
        return attention(workload.embed_dim, workload.heads, batch_first=True)
    raise NotImplementedError(f"{workload.name} names no module of torch.nn to compare with")


def run_module(module: nn.Module, inputs: ModuleInputs, *, needs_mask: bool) -> Run:
    """A module on its inputs; needs_mask: is_causal alone does not make it causal, as in torch.nn."""
    workload, x, memory = inputs.workload, inputs.x, inputs.memory
    hidden = None
    if workload.causal and needs_mask:
        # In the type of x: torch.nn turns a bool mask into one at every call.
        hidden = nn.Transformer.generate_square_subsequent_mask(workload.seqlen_q, device=x.device, dtype=x.dtype)
    padding = inputs.padding
    if hidden is not None and padding is not None:
        padding = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -math.inf)

    def layer() -> Tensor:
        out: Tensor = module(x, src_mask=hidden, src_key_padding_mask=padding, is_causal=workload.causal)
        return out

    def attention() -> Tensor:
        mask = {"attn_mask": hidden, "key_padding_mask": padding, "is_causal": workload.causal}
        out: Tensor = module(x, memory, memory, need_weights=False, **mask)[0]
        return out

    leaves = {"dx": x} | ({"dmemory": memory} if workload.cross else {})
    leaves |= {f"d{name}": parameter for name, parameter in module.named_parameters()}
    return Run(forward=layer if workload.module == "layer" else attention, leaves=leaves, dout=inputs.dout, module=module)


def _torch_nn(inputs: ModuleInputs, weights: nn.Module) -> Run:
    return run_module(weights, inputs, needs_mask=True)


def _our_module(inputs: ModuleInputs, weights: nn.Module) -> Run:
    return run_module(our_module(inputs.workload, inputs.x.dtype, weights), inputs, needs_mask=False)


TORCH_MODULE = "torch.nn"
CONTENDERS = (
    Contender(OURS, "attention", ours, ours=True),
    Contender("torch SDPA", "attention", _sdpa),
    Contender(NAIVE, "attention", _naive),
    Contender(OURS, "module", _our_module, ours=True),
    Contender(TORCH_MODULE, "module", _torch_nn),
)
