"""What a MultiHeadAttention can do beyond torch's: the options, the parameters they bring, and the calls they cannot take.

    head_i = attention(turn(norm(Q W_Q_i)), turn(norm(K W_K_g)), V W_V_g),    g = i // (heads / kv_heads)

Sources: grouped queries, Ainslie et al., 2023, https://arxiv.org/abs/2305.13245; norms of queries and keys, Henry et al., 2020,
https://arxiv.org/abs/2010.04245; the turn, fused_attention.rotary; the others, fused_attention.functional.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fused_attention.positional import alibi_slopes
from fused_attention.rotary import Rotary, apply_rotary

from .norms import RMSNorm


@dataclass(frozen=True)
class AttentionExtras:
    """The keyword-only options of MultiHeadAttention, which says what each means."""

    head_dim: int | None = None
    num_kv_heads: int | None = None
    rotary: Rotary | None = None
    qk_norm: Literal["rms", "layer"] | None = None
    qk_norm_eps: float = 1e-6
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    alibi: bool = False
    qkv_bias: bool | None = None
    out_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.head_dim is not None and (not isinstance(self.head_dim, int) or isinstance(self.head_dim, bool) or self.head_dim < 1):
            raise ValueError(f"head_dim is {self.head_dim!r}, expected an int of at least 1, or None for embed_dim / num_heads")
        if self.rotary is not None and not isinstance(self.rotary, Rotary):
            raise TypeError(f"rotary is {self.rotary!r}, expected a Rotary, such as Rotary(base=10000.0), or None")
        if self.qk_norm not in (None, "rms", "layer"):
            raise ValueError(f'qk_norm is {self.qk_norm!r}, expected "rms" or "layer", or None for no norm')
        if self.window is not None:
            _check_window(self.window)
        for name in ("sinks", "alibi", "qkv_bias", "out_bias"):
            if not isinstance(getattr(self, name), bool) and (name in ("sinks", "alibi") or getattr(self, name) is not None):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.qk_norm is None and self.qk_norm_eps != AttentionExtras.qk_norm_eps:
            raise ValueError(f'qk_norm_eps is {self.qk_norm_eps!r} and qk_norm is None: give qk_norm "rms" or "layer" too')
        if self.softcap is not None and not (_is_number(self.softcap) and 0.0 < self.softcap < math.inf):
            raise ValueError(f"softcap is {self.softcap!r}, expected a finite number above 0, or None for no cap")
        if self.scale is not None and not (_is_number(self.scale) and math.isfinite(self.scale)):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number, or None for head_dim ** -0.5")

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}

    def without_positions(self) -> dict[str, Any]:
        """The options given that suit cross-attention: there a query has no distance to a key."""
        return {name: value for name, value in self.given().items() if name not in ("rotary", "window", "alibi")}

    def check(self, module: nn.MultiheadAttention) -> None:
        """A ValueError where the options do not fit the module's heads, or the keys that it adds."""
        heads, kv_heads = module.num_heads, self.num_kv_heads
        if kv_heads is not None and (not isinstance(kv_heads, int) or isinstance(kv_heads, bool) or kv_heads < 1 or heads % kv_heads):
            raise ValueError(f"num_kv_heads is {kv_heads!r}, num_heads {heads}: expected an int that divides the number of heads")
        if self.rotary is not None:
            self.rotary.pairs(module.head_dim)
        if module.bias_k is not None and kv_heads not in (None, heads):
            raise ValueError(f"add_bias_kv=True adds a key of {heads} heads, num_kv_heads is {kv_heads}: use sinks=True, or one of the two")
        for name in ("window", "alibi"):
            if getattr(self, name) and (module.bias_k is not None or module.add_zero_attn):
                raise ValueError(f"{name} counts distances, and the keys of add_bias_kv and add_zero_attn stand nowhere: use sinks=True")


class AttentionOptions(TypedDict, total=False):
    """AttentionExtras as keyword arguments."""

    head_dim: int | None
    num_kv_heads: int | None
    rotary: Rotary | None
    qk_norm: Literal["rms", "layer"] | None
    qk_norm_eps: float
    window: tuple[int | None, int | None] | None
    softcap: float | None
    scale: float | None
    sinks: bool
    alibi: bool
    qkv_bias: bool | None
    out_bias: bool | None


def refuse_unknown(layer: type[nn.Module], options: AttentionOptions) -> None:
    """A TypeError in Python's words, with the layer's name, for keywords of neither the layer nor its attention."""
    for name in options:
        if name not in AttentionOptions.__annotations__:
            known = ", ".join(AttentionOptions.__annotations__)
            raise TypeError(
                f"{layer.__name__}.__init__() got an unexpected keyword argument {name!r}: "
                f"expected one in the signature of {layer.__name__}, or of its attention ({known})"
            )


def add_parameters(module: nn.MultiheadAttention, extras: AttentionExtras) -> None:
    """Gives a module just built as torch's the parameters of its extras, uninitialised: `reset_parameters` is next."""
    weight = module.out_proj.weight
    new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    embed_dim, head_dim = module.embed_dim, module.head_dim
    q_features = module.num_heads * head_dim
    kv_features = (module.num_heads if extras.num_kv_heads is None else extras.num_kv_heads) * head_dim
    if not q_features == kv_features == embed_dim:
        if not module._qkv_same_embed_dim:
            module.q_proj_weight = nn.Parameter(torch.empty(q_features, embed_dim, **new))
            module.k_proj_weight = nn.Parameter(torch.empty(kv_features, module.kdim, **new))
            module.v_proj_weight = nn.Parameter(torch.empty(kv_features, module.vdim, **new))
        else:
            module.in_proj_weight = nn.Parameter(torch.empty(q_features + 2 * kv_features, embed_dim, **new))
    biased = module.in_proj_bias is not None
    if biased if extras.qkv_bias is None else extras.qkv_bias:
        module.in_proj_bias = nn.Parameter(torch.empty(q_features + 2 * kv_features, **new))
    else:
        module.register_parameter("in_proj_bias", None)
    if q_features != embed_dim:
        module.out_proj = type(module.out_proj)(q_features, embed_dim, bias=module.out_proj.bias is not None, **new)
        if module.bias_k is not None:
            module.bias_k, module.bias_v = (nn.Parameter(torch.empty(1, 1, q_features, **new)) for _ in range(2))
    if biased if extras.out_bias is None else extras.out_bias:
        module.out_proj.bias = nn.Parameter(torch.empty(embed_dim, **new))
    else:
        module.out_proj.register_parameter("bias", None)
    if extras.sinks:
        module.sinks = nn.Parameter(torch.empty(module.num_heads, **new))
    if extras.qk_norm is not None:
        module.q_norm, module.k_norm = (norm_of_heads(extras, head_dim, biased, new) for _ in range(2))
    module.register_forward_pre_hook(keeps_native_operators_out)


def keeps_native_operators_out(module: nn.Module, inputs: Any) -> None:
    """Does nothing: torch's layers call an attention that has hooks; the weights of others go to operators that know no extras."""


def norm_of_heads(extras: AttentionExtras, head_dim: int, bias: bool, new: dict[str, Any]) -> nn.Module:
    """One norm of head_dim, by qk_norm and qk_norm_eps; bias is LayerNorm's alone."""
    if extras.qk_norm == "rms":
        return RMSNorm(head_dim, eps=extras.qk_norm_eps, **new)
    return nn.LayerNorm(head_dim, eps=extras.qk_norm_eps, bias=bias, **new)


def reset_parameters(module: nn.MultiheadAttention, extras: AttentionExtras) -> None:
    """As torch draws them: Xavier's in-projection as one matrix, biases 0, out_proj.weight left as nn.Linear drew it; sinks 0."""
    for weight in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
        if weight is not None:
            nn.init.xavier_uniform_(weight)
    for vector in (module.in_proj_bias, module.out_proj.bias, getattr(module, "sinks", None)):
        if vector is not None:
            nn.init.zeros_(vector)
    for added in (module.bias_k, module.bias_v):
        if added is not None:
            nn.init.xavier_normal_(added)
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        if norm is not None:
            norm.reset_parameters()


def turn(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Queries and keys (batch, heads, seqlen, head_dim), each row turned by its position."""
    length = torch.sym_max(q.shape[2], k.shape[2])
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    cos, sin = rotary.tables(length, q.shape[-1], device=q.device, dtype=dtype)
    return apply_rotary(q, cos, sin, interleaved=rotary.interleaved), apply_rotary(k, cos, sin, interleaved=rotary.interleaved)


def attention_options(module: nn.MultiheadAttention, extras: AttentionExtras, q: Tensor, causal: bool) -> dict[str, Any]:
    """The extras that are options of `attention`; a causal call sees no later key, whatever the window."""
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return {
        "window": (extras.window[0], 0) if extras.window is not None and causal else extras.window,
        "softcap": extras.softcap,
        "scale": extras.scale,
        "sinks": module.sinks if extras.sinks else None,
        "alibi_slopes": alibi_slopes(module.num_heads, device=q.device, dtype=dtype) if extras.alibi else None,
    }


def refuse_script(module: nn.Module, extras: Any) -> None:
    """TorchScript runs torch's own functions, which know no extras."""
    if extras is not None:
        raise NotImplementedError(
            f"torch.jit.script cannot compile a {type(module).__name__} with {', '.join(extras.given())}: "
            "use torch.compile or torch.export, or build it without these options"
        )


def _check_window(window: tuple[int | None, int | None]) -> None:
    if not isinstance(window, tuple) or len(window) != 2:
        raise TypeError(f"window is {window!r}, expected a pair (left, right), each an int of at least 0 or None for unbounded")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(f"window is {window!r}, expected each side to be an int of at least 0, or None for unbounded (not -1)")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
