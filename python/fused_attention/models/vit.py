"""ViT: an image as a text of patches, and an encoder that says what is on it.

    x = (class, W patch_1 + b, ..., W patch_n + b) + positions,   x = layer_n(... layer_1(x)),   logits = head(norm(x)[class])

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, https://arxiv.org/abs/2010.11929
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerLayer


@dataclass(frozen=True)
class ViTConfig:
    """image, patch: sides in pixels; of a 224 by 224 image with patches of 16 the encoder sees 197 rows."""

    classes: int
    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    heads: int = 12
    layers: int = 12
    feed_forward: int = 3072
    dropout: float = 0.0
    eps: float = 1e-6


class ViT(nn.Module):
    """images (batch, channels, image, image) -> logits (batch, classes). layer: builds a layer as ours does."""

    def __init__(self, config: ViTConfig, *, layer: Any = TransformerLayer) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Conv2d(config.channels, width, config.patch, stride=config.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (config.image // config.patch) ** 2 + 1, width) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Iterable[Any] = nn.ModuleList(
            layer(width, config.heads, config.feed_forward, config.dropout, F.gelu, config.eps, batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, config.eps)
        self.head = nn.Linear(width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.first.expand(patches.shape[0], 1, -1)
        x = self.dropout(torch.cat([first, patches], 1) + self.positions)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits
