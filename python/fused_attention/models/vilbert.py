"""ViLBERT: an image and a sentence, each in a stream of its own, which look at each other.

    co-attention:  x = norm1(x + attention(x, other)),   x = norm2(x + feed_forward(x))       with x the words and other the image, and
                   the other way around at the same time; then each stream attends to itself
    match        = w · (words[first] ⊙ image[first]) + b                                       whether the two belong together

Source: Lu et al., "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations", 2019, https://arxiv.org/abs/1908.02265; there the
streams have widths of their own, here one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerLayer

from .lengths import check_length


@dataclass(frozen=True)
class ViLBERTConfig:
    """regions: of an image, each of `features` numbers. text_layers come before the `layers` pairs of co-attention and self-attention."""

    vocabulary: int
    context: int
    regions: int
    features: int
    width: int = 768
    heads: int = 12
    text_layers: int = 6
    layers: int = 6
    feed_forward: int = 3072
    dropout: float = 0.1


class ViLBERT(nn.Module):
    """words (batch, seqlen), image (batch, regions, features) -> logits (batch,) of their belonging together.

    Each stream has a row of its own in front, whose last state stands for the whole. layer: builds a layer as ours does.
    """

    def __init__(self, config: ViLBERTConfig, *, layer: Any = TransformerLayer) -> None:
        super().__init__()
        self.config = config
        width = config.width

        def stack(layers: int) -> Iterable[Any]:
            shape = width, config.heads, config.feed_forward, config.dropout, F.gelu
            return nn.ModuleList(layer(*shape, batch_first=True) for _ in range(layers))

        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.randn(config.context + 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(config.regions + 1, width) * 0.02)
        self.first_word, self.first_region = (nn.Parameter(torch.randn(width) * 0.02) for _ in range(2))
        self.features = nn.Linear(config.features, width)
        self.word_norm, self.region_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.text_layers = stack(config.text_layers)
        self.word_looks, self.region_looks = stack(config.layers), stack(config.layers)
        self.word_layers, self.region_layers = stack(config.layers), stack(config.layers)
        self.match = nn.Linear(width, 1)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, words: Tensor, image: Tensor, hidden: Tensor | None = None) -> Tensor:
        """hidden: bool (batch, seqlen), True for words that are padding."""
        check_length("words", words, self.config.context)
        hidden = None if hidden is None else F.pad(hidden, (1, 0), value=False)
        x = _with_first(self.first_word, self.tokens(words))
        x = self.word_norm(x + self.positions[: x.shape[1]])
        regions = self.region_norm(_with_first(self.first_region, self.features(image)) + self.places)
        for layer in self.text_layers:
            x = layer(x, src_key_padding_mask=hidden)
        blocks = zip(self.word_looks, self.region_looks, self.word_layers, self.region_layers, strict=True)
        for word_look, region_look, word_layer, region_layer in blocks:
            x, regions = co_attend(word_look, x, regions), co_attend(region_look, regions, x, hidden)
            x, regions = word_layer(x, src_key_padding_mask=hidden), region_layer(regions)
        match: Tensor = self.match(x[:, 0] * regions[:, 0])
        return match.squeeze(-1)


def co_attend(layer: Any, x: Tensor, other: Tensor, hidden: Tensor | None = None) -> Tensor:
    """A post-norm layer whose queries are x (batch, seqlen, width) and whose keys and values are the rows of the other stream."""
    seen, _ = layer.self_attn(x, other, other, key_padding_mask=hidden, need_weights=False)
    x = layer.norm1(x + layer.dropout1(seen))
    out: Tensor = layer.norm2(x + layer._ff_block(x))
    return out


def _with_first(first: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([first.expand(rows.shape[0], 1, -1), rows], 1)
