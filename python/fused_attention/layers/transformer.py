"""The transformer encoder layer as a drop-in for torch's: same parameters, arguments and results, on our attention.

    post-norm:  x = norm1(x + attention(x)),    x = norm2(x + linear2(activation(linear1(x))))
    pre-norm:   x = x + attention(norm1(x)),    x = x + linear2(activation(linear1(norm2(x))))

Sources: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Xiong et al., 2020, https://arxiv.org/abs/2002.04745
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrangement import arrange
from .blocks import LayerExtras, add_extras
from .cached import AnyCache, decode
from .extras import AttentionOptions, refuse_script, refuse_unknown
from .fused import feed_forward
from .gated import GATED, gated_name
from .multihead import MultiHeadAttention

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11

# Bound at import: users do assign nn.TransformerEncoderLayer = TransformerLayer, and an override is told by comparing with torch's method.
StockLayer = nn.TransformerEncoderLayer


class TransformerLayer(StockLayer):
    """`torch.nn.TransformerEncoderLayer` with its constructor, state dict, initial weights and arguments, on a `MultiHeadAttention`.

    Where it means to differ, beside what MultiHeadAttention says of itself:
    - Evaluation runs the same code as training: overridden `_sa_block` and `_ff_block` and hooks always run,
      and padded positions get the same values.
    - bool masks reach the attention as they are, unless `_sa_block` is overridden: then it gets torch's floating form.

    Beyond torch's, keyword-only; without them the layer is torch's in every parameter and every random number drawn:
        attention: what MultiHeadAttention takes beyond torch's (num_kv_heads, rotary, ...); qk_norm_eps is layer_norm_eps if not given.
        activation: also "swiglu" or "geglu"; linear1 is then twice as wide as dim_feedforward, the gates first.
        norm: "rms" for RMSNorm instead of LayerNorm.
        sandwich: whether each block has a norm behind it too, after1 and after2; needs norm_first.
        parallel: both blocks side by side, fed by norm1 alone ("one_norm") or by norm1 and norm2 ("two_norms"); needs norm_first.
        ff_bias, norm_bias: whether linear1 and linear2, and LayerNorms, have a bias, where that is not what `bias` says.
    TorchScript refuses such a layer. Llama's is one call: TransformerLayer(4096, 32, 14336, 0.0, "swiglu", norm_first=True, bias=False,
    batch_first=True, norm="rms", num_kv_heads=8, rotary=Rotary(base=500000.0)).
    """

    # Of the class, as a layer whose class was changed has not run __init__; a name that users do not give their own attributes.
    _fused_extras: LayerExtras | None = None
    after1: nn.Module
    after2: nn.Module

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        norm: Literal["layer", "rms"] = "layer",
        sandwich: bool = False,
        parallel: Literal["one_norm", "two_norms"] | None = None,
        ff_bias: bool | None = None,
        norm_bias: bool | None = None,
        **attention: "Unpack[AttentionOptions]",
    ) -> None:
        extras = LayerExtras(norm, sandwich, parallel, ff_bias, norm_bias, gated_name(activation))
        extras.check(norm_first)
        refuse_unknown(type(self), attention)
        stock = activation if extras.activation is None else GATED[extras.activation]
        heads = nhead if attention.get("head_dim") is None else 1  # torch wants to divide d_model among them
        super().__init__(d_model, heads, dim_feedforward, dropout, stock, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        # By class: a second module would draw from the generator, and the same seed must give the same weights as torch's layer.
        self.self_attn.__class__ = MultiHeadAttention
        add_extras(self, nhead, extras, attention, layer_norm_eps)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like src.

        src: (seqlen, batch, d_model), (batch, seqlen, d_model) with batch_first, or (seqlen, d_model).
        src_mask: (seqlen, seqlen) or (batch * nhead, seqlen, seqlen); src_key_padding_mask: (batch, seqlen) or (seqlen,).
        Either bool, True hides, or floating, added to the scores. is_causal hides later positions, with or without masks.
        """
        carries = False
        # A statement of its own: of an `or`, TorchScript would compile both sides.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            carries = self._carries(src_mask, src_key_padding_mask)
        if not carries:
            other = F._none_or_dtype(src_mask)
            src_key_padding_mask = F._canonical_mask(src_key_padding_mask, "src_key_padding_mask", other, "src_mask", src.dtype)
            src_mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, False)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._arranged(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out

    def decode(self, src: Tensor, cache: AnyCache) -> Tensor:
        """The layer's output for rows that follow those whose keys and values the cache holds, and now these rows' too; inference only.

        src: (batch, rows, d_model), or (rows, batch, d_model) without batch_first: each row sees itself and what came before, as with
        is_causal. cache: of `self.self_attn.new_cache(batch, capacity)`. An overridden `_sa_block` is not called.
        """
        return arrange(self, src, lambda x: self.dropout1(decode(self.self_attn, x, cache)), self._ff_block)

    def _ff_block(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return feed_forward(self, x, self.dropout2)
        fed: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return fed

    def _arranged(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        return arrange(self, x, lambda x: self._sa_block(x, mask, padding, is_causal=is_causal), self._ff_block)

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self, self._fused_extras)
        return self

    def _carries(self, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> bool:
        """Whether the masks may reach our attention as they came: bool ones, a byte an element. Others need torch's checks and form."""
        bools = all(mask is None or mask.dtype is torch.bool for mask in (src_mask, src_key_padding_mask))
        return bools and hands_masks_on(self, StockLayer)


def hands_masks_on(layer: Any, cls: type[nn.TransformerEncoderLayer] | type[nn.TransformerDecoderLayer]) -> bool:
    """Whether nothing but the `_sa_block` of cls stands between the layer's masks and our attention, which takes them in any form."""
    own = getattr(type(layer), "_sa_block", None) is cls._sa_block and "_sa_block" not in vars(layer)
    attention = layer.self_attn
    return own and getattr(type(attention), "forward", None) is MultiHeadAttention.forward and "forward" not in vars(attention)
