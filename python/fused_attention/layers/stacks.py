"""Stacks of encoder and decoder layers, and the encoder-decoder Transformer, as drop-ins for torch's.

    memory = norm(layer_n(... layer_1(src)))
    out    = norm(layer_n(... layer_1(tgt, memory), memory))

Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from .blocks import LayerExtras, norm_of_layer
from .decoder import TransformerDecoderLayer
from .extras import AttentionOptions, refuse_unknown
from .gated import gated_name
from .multihead import MultiHeadAttention
from .transformer import TransformerLayer, hands_masks_on

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` with its constructor, state dict and arguments; it takes torch's layers, ours, and others.

    Where it means to differ:
    - It makes no nested tensors of padded batches, so evaluation equals training, padded positions included.
    - `is_causal=None` compares the mask with a causal one where that costs no synchronisation: on the CPU, outside of compilers.
      A causal mask so found reaches layers of ours as the hint alone, with which their attention skips what is hidden.
    - bool masks reach layers of ours as they are; others get torch's floating form.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The last layer's output, normalised if there is a norm, shaped like src.

        src, mask, src_key_padding_mask: as the layers take them. is_causal hides later positions, with or without masks.
        """
        plain = False
        # A statement of its own: of an `and`, TorchScript would compile both sides.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            plain = _plain(self.layers, TransformerLayer)
        if not plain or not _bool(mask) or not _bool(src_key_padding_mask):
            other = F._none_or_dtype(mask)
            src_key_padding_mask = F._canonical_mask(src_key_padding_mask, "src_key_padding_mask", other, "mask", src.dtype)
            mask = F._canonical_mask(mask, "mask", None, "", src.dtype, False)
        causal = _causal(mask, is_causal, src, self.layers[0].self_attn.batch_first)
        if plain and _says_no_more(mask, causal, is_causal):
            mask = None
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        if self.norm is not None:
            output = self.norm(output)
        return output


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` with its constructor, state dict and arguments; it takes torch's layers, ours, and others.

    Where it means to differ: `tgt_is_causal=None` compares the mask with a causal one where that costs no synchronisation, on the
    CPU and outside of compilers. A causal mask so found reaches layers of ours as the hint alone, with which their attention
    skips what is hidden.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The last layer's output, normalised if there is a norm, shaped like tgt.

        tgt, memory and the masks: as the layers take them. tgt_is_causal hides later targets, with or without masks.
        """
        causal = _causal(tgt_mask, tgt_is_causal, tgt, self.layers[0].self_attn.batch_first)
        plain = False
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            plain = _plain(self.layers, TransformerDecoderLayer)
        if plain and _says_no_more(tgt_mask, causal, tgt_is_causal):
            tgt_mask = None
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        if self.norm is not None:
            output = self.norm(output)
        return output


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` with its constructor, state dict, initial weights and arguments, of our stacks and layers.

    custom_encoder and custom_decoder stay what they are. Where it means to differ is what its parts say of themselves.

    Beyond torch's, keyword-only, as TransformerDecoderLayer has them, for the layers of both stacks: attention, activation, norm, also
    of the stacks' last norms, sandwich, ff_bias and norm_bias.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
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
        refuse_unknown(type(self), attention)
        encoder, decoder = custom_encoder, custom_decoder
        if extras.given() or attention:
            if encoder is not None and decoder is not None:
                given = ", ".join((*extras.given(), *attention))
                raise ValueError(f"{given} would change layers, and custom_encoder and custom_decoder leave none to build: build them so")
            arguments = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
            arranged: dict[str, Any] = {"norm": norm, "sandwich": sandwich, "ff_bias": ff_bias, "norm_bias": norm_bias, **attention}
            last = partial(norm_of_layer, extras, d_model, layer_norm_eps, bias, {"device": device, "dtype": dtype})
            if encoder is None:
                encoder = TransformerEncoder(TransformerLayer(*arguments, **arranged), num_encoder_layers, last(), False)
            if decoder is None:
                decoder = TransformerDecoder(TransformerDecoderLayer(*arguments, **arranged), num_decoder_layers, last())
        super().__init__(
            d_model,
            nhead,
            num_encoder_layers,
            num_decoder_layers,
            dim_feedforward,
            dropout,
            activation,
            encoder,
            decoder,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        # By class: further modules would draw from the generator, and the same seed must give the same weights as torch's model.
        if encoder is None:
            self.encoder.__class__ = TransformerEncoder
            for layer in self.encoder.layers:
                layer.__class__ = TransformerLayer
                layer.self_attn.__class__ = MultiHeadAttention
        if decoder is None:
            self.decoder.__class__ = TransformerDecoder
            for layer in self.decoder.layers:
                layer.__class__ = TransformerDecoderLayer
                layer.self_attn.__class__ = MultiHeadAttention
                layer.multihead_attn.__class__ = MultiHeadAttention


def _plain(layers: nn.ModuleList, cls: type[TransformerLayer] | type[TransformerDecoderLayer]) -> bool:
    """Whether nothing but our own code stands between the stack's masks and our attention, which takes them in any form."""
    return all(
        getattr(type(layer), "forward", None) is cls.forward
        and "forward" not in vars(layer)
        and not (layer._forward_pre_hooks_with_kwargs or layer._forward_hooks_with_kwargs)  # masks are passed by keyword
        and hands_masks_on(layer, cls)
        for layer in layers
    )


def _bool(mask: Tensor | None) -> bool:
    return mask is None or mask.dtype == torch.bool


def _causal(mask: Tensor | None, is_causal: bool | None, x: Tensor, batch_first: bool) -> bool:
    """is_causal, or where it is None whether the mask is a causal one, if that can be read; TorchScript compiles it."""
    readable = True
    if not torch.jit.is_scripting() and mask is not None:  # type: ignore[attr-defined]
        # A comparison on a GPU waits for it, and none can be made while tracing; a fake tensor is of a type of its own.
        readable = not torch.compiler.is_compiling() and mask.device.type == "cpu" and type(mask) in (Tensor, nn.Parameter)
    if readable:
        return bool(_detect_is_causal_mask(mask, is_causal, _get_seq_len(x, batch_first)))
    return is_causal is True


def _says_no_more(mask: Tensor | None, causal: bool, is_causal: bool | None) -> bool:
    """Whether the mask was read and found to be the causal one: without it attention skips what it hides."""
    return causal and is_causal is None and mask is not None and not mask.requires_grad
