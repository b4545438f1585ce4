"""GPT: a causal decoder that predicts the next token of a text.

    x = tokens[t] + positions[t],   x = layer_n(... layer_1(x)),   logits = norm(x) tokensᵀ

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019; Radford et al., "Improving Language
Understanding by Generative Pre-Training", 2018
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerLayer

from .caches import Caches
from .lengths import check_length


@dataclass(frozen=True)
class GPTConfig:
    """tanh_gelu: GPT-2's approximation of GELU, which its weights need."""

    vocabulary: int
    context: int
    width: int = 768
    heads: int = 12
    layers: int = 12
    dropout: float = 0.1
    tanh_gelu: bool = False


class GPT(nn.Module):
    """tokens (batch, seqlen) -> logits (batch, seqlen, vocabulary) of the token that follows each; the embedding is also the last layer.

    layer: builds a layer as `TransformerLayer(width, heads, ...)` does.
    """

    def __init__(self, config: GPTConfig, *, layer: Any = TransformerLayer) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        activation = partial(F.gelu, approximate="tanh") if config.tanh_gelu else F.gelu
        self.layers: Iterable[Any] = nn.ModuleList(
            layer(config.width, config.heads, 4 * config.width, config.dropout, activation, batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # The sum of 2 * layers blocks would grow with depth: GPT-2 scales what each adds.
                shrink = (2 * config.layers) ** -0.5 if name.endswith(("out_proj.weight", "linear2.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """tokens: int64 (batch, seqlen), seqlen at most the context; padding: int (batch,), how many tokens on the left are none."""
        check_length("tokens", tokens, self.config.context)
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = None if padding is None else rows < padding[:, None]
        x = self._embed(tokens, rows if padding is None else (rows - padding[:, None]).clamp(min=0))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=hidden, is_causal=True)
        return self._logits(x)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of tokens (batch, seqlen + 1): each is predicted from those before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def new_caches(self, batch: int, capacity: int) -> Caches:
        """Empty caches for texts of up to `capacity` tokens; a ValueError where those are more than the context."""
        if capacity > self.config.context:
            raise ValueError(f"capacity is {capacity}, and there are positions for {self.config.context} tokens: shorten the text")
        return Caches([layer.self_attn.new_cache(batch, capacity) for layer in self.layers])

    def decode(self, tokens: Tensor, caches: Caches, *, last: bool = False) -> Tensor:
        """The logits (batch, seqlen, vocabulary) of tokens that follow those in the caches, which keep these too.

        last: of the last token alone, (batch, 1, vocabulary).
        """
        x = self._embed(tokens, caches.positions(tokens.shape[1], self.config.context))
        for layer, cache in zip(self.layers, caches.text, strict=True):
            x = layer.decode(x, cache)
        return self._logits(x[:, -1:] if last else x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.tokens(tokens) + self.positions(positions))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.tokens.weight)
