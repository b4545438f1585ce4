"""The transformer decoder layer as a drop-in for torch's: same parameters, arguments and results, on our attention.

    post-norm:  x = norm1(x + attention(x)),  x = norm2(x + attention(x, memory)),  x = norm3(x + linear2(activation(linear1(x))))
    pre-norm:   x = x + attention(norm1(x)),  x = x + attention(norm2(x), memory),  x = x + linear2(activation(linear1(norm3(x))))

Sources: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Xiong et al., 2020, https://arxiv.org/abs/2002.04745
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrangement import arrange
from .blocks import LayerExtras, add_extras
from .cached import AnyCache, decode, look_up
from .extras import AttentionOptions, refuse_script, refuse_unknown
from .fused import feed_forward
from .gated import GATED, gated_name
from .multihead import MultiHeadAttention

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with its constructor, state dict, initial weights and arguments, on two `MultiHeadAttention`.

    Where it means to differ is what MultiHeadAttention says of itself, for self-attention and for cross-attention: `tgt_is_causal`
    and `memory_is_causal` are obeyed with and without masks, query i then sees no key after i; a target that sees no key, of a
    memory padded as a whole for instance, adds the bias of out_proj and has finite gradients.

    Beyond torch's, keyword-only, as TransformerLayer has them: attention, activation, norm, sandwich, ff_bias and norm_bias. Of
    `attention`, rotary, window and alibi are the self-attention's alone: a target has no distance to a position of the memory.
    """

    # Of the class, as a layer whose class was changed has not run __init__; a name that users do not give their own attributes.
    _fused_extras: LayerExtras | None = None
    after1: nn.Module
    after2: nn.Module
    after3: nn.Module

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
        ff_bias: bool | None = None,
        norm_bias: bool | None = None,
        **attention: "Unpack[AttentionOptions]",
    ) -> None:
        extras = LayerExtras(norm, sandwich, None, ff_bias, norm_bias, gated_name(activation))
        extras.check(norm_first)
        refuse_unknown(type(self), attention)
        stock = activation if extras.activation is None else GATED[extras.activation]
        heads = nhead if attention.get("head_dim") is None else 1  # torch wants to divide d_model among them
        super().__init__(d_model, heads, dim_feedforward, dropout, stock, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        # By class: further modules would draw from the generator, and the same seed must give the same weights as torch's layer.
        self.self_attn.__class__ = MultiHeadAttention
        self.multihead_attn.__class__ = MultiHeadAttention
        add_extras(self, nhead, extras, attention, layer_norm_eps)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like tgt.

        tgt, memory: (seqlen, batch, d_model), (batch, seqlen, d_model) with batch_first, or (seqlen, d_model), each of its own seqlen.
        tgt_mask, memory_mask: (seqlen, seqlen) or (batch * nhead, seqlen, seqlen), of targets, of targets and memory.
        tgt_key_padding_mask, memory_key_padding_mask: (batch, seqlen) or (seqlen,). Masks are bool, True hides, or floating, added.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._arranged(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
            )
        x = tgt
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            x = x + self._mha_block(self.norm2(x), memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal))
        x = self.norm2(x + self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal))
        out: Tensor = self.norm3(x + self._ff_block(x))
        return out

    def decode(self, tgt: Tensor, cache: AnyCache, memory: AnyCache) -> Tensor:
        """The layer's output for targets that follow those whose keys and values the cache holds, and now these targets' too.

        tgt: (batch, rows, d_model), or (rows, batch, d_model) without batch_first: each row sees itself and what came before, as with
        tgt_is_causal. cache: of `self.self_attn.new_cache(batch, capacity)`. memory: a cache of `self.multihead_attn`, given its keys and
        values by `remember`, once for all targets. Inference only; overridden `_sa_block` and `_mha_block` are not called.
        """
        return arrange(
            self,
            tgt,
            lambda x: self.dropout1(decode(self.self_attn, x, cache)),
            lambda x: self.dropout2(look_up(self.multihead_attn, x, memory)),
            self._ff_block,
        )

    def _ff_block(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return feed_forward(self, x, self.dropout3)
        fed: Tensor = self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return fed

    def _arranged(
        self,
        x: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        return arrange(
            self,
            x,
            lambda x: self._sa_block(x, tgt_mask, tgt_padding, tgt_is_causal),
            lambda x: self._mha_block(x, memory, memory_mask, memory_padding, memory_is_causal),
            self._ff_block,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self, self._fused_extras)
        return self
