"""What a transformer layer can be beyond torch's: other norms in other places, a gated feed-forward block, blocks side by side.

    sandwich:  x = x + after1(attention(norm1(x))),  x = x + after2(feed_forward(norm2(x)))
    parallel:  x = x + attention(norm1(x)) + feed_forward(norm1(x) or norm2(x))
    rms:       norm(x) = x / sqrt(mean(x²) + eps) · weight

Sources: RMSNorm, Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467; sandwich, Ding et al., 2021,
https://arxiv.org/abs/2105.13290; parallel, Wang and Komatsuzaki, GPT-J, 2021, and Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from .extras import AttentionExtras, AttentionOptions, norm_of_heads
from .multihead import MultiHeadAttention
from .norms import RMSNorm


@dataclass(frozen=True)
class LayerExtras:
    """The keyword-only options of the layers, which say what each means; activation is the name of a gated one."""

    norm: Literal["layer", "rms"] = "layer"
    sandwich: bool = False
    parallel: Literal["one_norm", "two_norms"] | None = None
    ff_bias: bool | None = None
    norm_bias: bool | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "rms"):
            raise ValueError(f'norm is {self.norm!r}, expected "layer" or "rms"')
        if not isinstance(self.sandwich, bool):
            raise TypeError(f"sandwich is {self.sandwich!r}, expected True or False")
        if self.parallel not in (None, "one_norm", "two_norms"):
            raise ValueError(f'parallel is {self.parallel!r}, expected "one_norm" or "two_norms", or None for one block after the other')
        for name in ("ff_bias", "norm_bias"):
            if not isinstance(getattr(self, name), bool | None):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected True or False, or None for what bias says")
        if self.norm == "rms" and self.norm_bias:
            raise ValueError('norm_bias is True, and norm "rms" has no bias: leave norm_bias out, or use norm="layer"')

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}

    def check(self, norm_first: bool) -> None:
        """A ValueError where the options need norms in front of the blocks and the layer has none there."""
        for name in ("sandwich", "parallel"):
            if getattr(self, name) and not norm_first:
                raise ValueError(f"{name}={getattr(self, name)!r} needs norm_first=True: its blocks are fed by norms")


def add_extras(layer: Any, nhead: int, extras: LayerExtras, options: AttentionOptions, eps: float) -> None:
    """Gives a layer just built as torch's what its extras and those of its attention, of nhead heads, ask for, if anything."""
    attention = AttentionExtras(**options)
    if attention.given():
        if attention.qk_norm is not None and "qk_norm_eps" not in options:
            attention = replace(attention, qk_norm_eps=eps)
        layer.self_attn = _attention(layer.self_attn, nhead, attention.given(), extras.norm_bias)
        if isinstance(layer, nn.TransformerDecoderLayer):
            layer.multihead_attn = _attention(layer.multihead_attn, nhead, attention.without_positions(), extras.norm_bias)
    if extras.given():
        layer._fused_extras = extras
        _rebuild(layer, extras, eps)
    if isinstance(layer, nn.TransformerEncoderLayer) and (attention.given() or extras.given()):
        layer.activation_relu_or_gelu = 0  # torch's stacks then make no nested tensor, which only its native operator takes


def _attention(stock: nn.MultiheadAttention, nhead: int, options: dict[str, Any], norm_bias: bool | None) -> MultiHeadAttention:
    new: dict[str, Any] = {"device": stock.out_proj.weight.device, "dtype": stock.out_proj.weight.dtype}
    attention = MultiHeadAttention(
        stock.embed_dim,
        nhead,
        stock.dropout,
        stock.in_proj_bias is not None,
        batch_first=stock.batch_first,
        **new,
        **options,
    )
    extras = attention._fused_extras
    if extras is not None and extras.qk_norm is not None and norm_bias is not None:
        attention.q_norm, attention.k_norm = (norm_of_heads(extras, attention.head_dim, norm_bias, new) for _ in range(2))
    return attention


def _rebuild(layer: Any, extras: LayerExtras, eps: float) -> None:
    linear1 = layer.linear1
    new: dict[str, Any] = {"device": linear1.weight.device, "dtype": linear1.weight.dtype}
    biased = linear1.bias is not None
    width, hidden = linear1.in_features, linear1.out_features
    if extras.activation is not None or extras.ff_bias not in (None, biased):
        bias = biased if extras.ff_bias is None else extras.ff_bias
        layer.linear1 = nn.Linear(width, 2 * hidden if extras.activation else hidden, bias=bias, **new)
        layer.linear2 = nn.Linear(hidden, width, bias=bias, **new)
    for name in [name for name, _ in layer.named_children() if name in ("norm1", "norm2", "norm3")]:
        setattr(layer, name, norm_of_layer(extras, width, eps, biased, new))
        if extras.sandwich:
            setattr(layer, name.replace("norm", "after"), norm_of_layer(extras, width, eps, biased, new))
    if extras.parallel == "one_norm":
        layer.register_module("norm2", None)


def norm_of_layer(extras: LayerExtras, width: int, eps: float, biased: bool, new: dict[str, Any]) -> nn.Module:
    """One norm of the kind that the extras name, with a bias where they say nothing and `biased` does."""
    if extras.norm == "rms":
        return RMSNorm(width, eps=eps, **new)
    return nn.LayerNorm(width, eps=eps, bias=biased if extras.norm_bias is None else extras.norm_bias, **new)
