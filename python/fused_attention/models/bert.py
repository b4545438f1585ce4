"""BERT: an encoder that sees a text from both sides, and guesses the words that were hidden in it.

    x = norm(tokens[t] + positions + kinds[k]),   x = layer_n(... layer_1(x)),   logits = norm(gelu(W x)) tokensᵀ + b

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019,
https://arxiv.org/abs/1810.04805
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerLayer

from .lengths import check_length


@dataclass(frozen=True)
class BERTConfig:
    """kinds: of segments, such as the first and the second sentence. deviation: of the first weights; width**-0.5 suits narrow models."""

    vocabulary: int
    context: int = 512
    width: int = 768
    heads: int = 12
    layers: int = 12
    feed_forward: int = 3072
    kinds: int = 2
    dropout: float = 0.1
    eps: float = 1e-12
    deviation: float = 0.02


class BERT(nn.Module):
    """tokens (batch, seqlen) -> logits (batch, seqlen, vocabulary) of the word at each place. layer: builds a layer as ours does."""

    def __init__(self, config: BERTConfig, *, layer: Any = TransformerLayer) -> None:
        super().__init__()
        self.config = config
        width, eps = config.width, config.eps
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Embedding(config.context, width)
        self.kinds = nn.Embedding(config.kinds, width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers: Iterable[Any] = nn.ModuleList(
            layer(width, config.heads, config.feed_forward, config.dropout, F.gelu, eps, batch_first=True) for _ in range(config.layers)
        )
        self.head = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.deviation)

    def forward(self, tokens: Tensor, hidden: Tensor | None = None, kinds: Tensor | None = None) -> Tensor:
        """hidden: bool (batch, seqlen), True for padding; kinds: int64 (batch, seqlen), 0 unless given."""
        x = self.head_norm(F.gelu(self.head(self.encode(tokens, hidden, kinds))))
        return F.linear(x, self.tokens.weight, self.head_bias)

    def encode(self, tokens: Tensor, hidden: Tensor | None = None, kinds: Tensor | None = None) -> Tensor:
        """What the last layer says of each token: (batch, seqlen, width)."""
        check_length("tokens", tokens, self.config.context)
        kinds = torch.zeros_like(tokens) if kinds is None else kinds
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]] + self.kinds(kinds)
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=hidden)
        encoded: Tensor = x
        return encoded

    def loss(self, cloze: "Cloze", hidden: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of the words asked for that are no padding; 0 where there are none."""
        asked = cloze.asked if hidden is None else cloze.asked & ~hidden
        total = F.cross_entropy(self(cloze.tokens, hidden)[asked], cloze.words[asked], reduction="sum")
        return total / asked.sum().clamp(min=1)


class Cloze(NamedTuple):
    """A text with words hidden: tokens as the model sees them, words as they were, asked (bool) where they are to be guessed."""

    tokens: Tensor
    words: Tensor
    asked: Tensor


def hide_words(words: Tensor, mask: int, vocabulary: int, *, share: float = 0.15, generator: torch.Generator | None = None) -> Cloze:
    """Asks for a share of the words (batch, seqlen): of ten, eight are replaced by the token `mask`, one by any token, one is left."""
    draw = torch.rand(2, *words.shape, generator=generator, device=words.device)
    asked = draw[0] < share
    anything = torch.randint(vocabulary, words.shape, generator=generator, device=words.device)
    seen = torch.where(draw[1] < 0.8, torch.full_like(words, mask), torch.where(draw[1] < 0.9, anything, words))
    return Cloze(torch.where(asked, seen, words), words, asked)
