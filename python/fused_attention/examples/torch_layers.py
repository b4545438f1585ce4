"""torch's own layers, called as ours are: what an example's time per step is compared with."""

import functools
from typing import Any

import torch
from torch import Tensor, nn


class TorchLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer; it takes is_causal for a hint about a mask, which must be given too."""

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> Tensor:
        return super().forward(src, later(src) if is_causal else src_mask, src_key_padding_mask, is_causal and src_key_padding_mask is None)


class TorchDecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer, likewise."""

    def forward(self, tgt: Tensor, memory: Tensor, *, memory_key_padding_mask: Any = None, tgt_is_causal: bool = False) -> Tensor:  # type: ignore[override]
        mask = later(tgt) if tgt_is_causal else None
        return super().forward(tgt, memory, mask, memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal)


def later(x: Tensor) -> Tensor:
    """The causal mask (seqlen, seqlen) of x (batch, seqlen, width), True where a key is hidden."""
    return _later(x.shape[1], x.device)


@functools.cache  # made once, as a model of torch's layers would
def _later(seqlen: int, device: torch.device) -> Tensor:
    return torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).triu(1)
