"""The transformer encoder layer as a drop-in for torch's: same parameters, arguments and results, on our attention.

    post-norm:  x = norm1(x + attention(x)),    x = norm2(x + linear2(activation(linear1(x))))
    pre-norm:   x = x + attention(norm1(x)),    x = x + linear2(activation(linear1(norm2(x))))

Sources: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Xiong et al., 2020, https://arxiv.org/abs/2002.04745
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .multihead import MultiHeadAttention

# Bound at import: users do assign nn.TransformerEncoderLayer = TransformerLayer, and an override is told by comparing with torch's method.
StockLayer = nn.TransformerEncoderLayer


class TransformerLayer(StockLayer):
    """`torch.nn.TransformerEncoderLayer` with its constructor, state dict, initial weights and arguments, on a `MultiHeadAttention`.

    Where it means to differ, beside what MultiHeadAttention says of itself:
    - Evaluation runs the same code as training: overridden `_sa_block` and `_ff_block` and hooks always run,
      and padded positions get the same values.
    - bool masks reach the attention as they are, unless `_sa_block` is overridden: then it gets torch's floating form.
    """

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
    ) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        # By class: a second module would draw from the generator, and the same seed must give the same weights as torch's layer.
        self.self_attn.__class__ = MultiHeadAttention

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
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
            x = self.norm2(x + self._ff_block(x))
        return x

    def _carries(self, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> bool:
        """Whether the masks may reach our attention as they came: bool ones, a byte an element. Others need torch's checks and form."""
        ours = isinstance(self.self_attn, MultiHeadAttention) and getattr(self._sa_block, "__func__", None) is StockLayer._sa_block
        return ours and all(mask is None or mask.dtype is torch.bool for mask in (src_mask, src_key_padding_mask))
