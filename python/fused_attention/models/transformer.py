"""The Transformer: an encoder that reads a sentence, and a decoder that writes another, looking at all that was read.

    memory = encoder(sqrt(width) tokens[source] + sinusoids),   logits = decoder(sqrt(width) tokens[target] + sinusoids, memory) tokensᵀ
    loss   = cross-entropy of target_i given source and target_<i, the truth smoothed by 0.1
    rate   = width^(-1/2) min(step^(-1/2), step warm_up_steps^(-3/2))

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerDecoderLayer, TransformerLayer
from fused_attention.positional import sinusoidal_positions

from .caches import Caches, caches_of
from .generation import Hypotheses, beam_search, generate
from .lengths import check_length


@dataclass(frozen=True)
class TransformerConfig:
    """One vocabulary of both languages; padding, start and end are tokens of it. longest: of source and of target."""

    vocabulary: int
    width: int = 512
    heads: int = 8
    layers: int = 6
    feed_forward: int = 2048
    dropout: float = 0.1
    longest: int = 1024
    padding: int = 0
    start: int = 1
    end: int = 2


class Transformer(nn.Module):
    """source (batch, seqlen), target (batch, seqlen_t), padded on the right -> logits (batch, seqlen_t, vocabulary) of what follows each.

    One embedding serves source, target and the last layer. encoder_layer, decoder_layer: build layers as ours do.
    """

    sinusoids: Tensor

    def __init__(
        self, config: TransformerConfig, *, encoder_layer: Any = TransformerLayer, decoder_layer: Any = TransformerDecoderLayer
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.register_buffer("sinusoids", sinusoidal_positions(config.longest, config.width), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        shape = config.width, config.heads, config.feed_forward, config.dropout
        self.encoder: Iterable[Any] = nn.ModuleList(encoder_layer(*shape, batch_first=True) for _ in range(config.layers))
        self.decoder: Iterable[Any] = nn.ModuleList(decoder_layer(*shape, batch_first=True) for _ in range(config.layers))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # As the embedding is scaled by sqrt(width) where it is read, this gives unit variance there and small logits at the end.
        nn.init.normal_(self.tokens.weight, std=config.width**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        check_length("target", target, self.config.longest)
        hidden = self._hidden(source)
        memory = self.encode(source)
        x = self._embed(target, self.sinusoids[: target.shape[1]])
        for layer in self.decoder:
            x = layer(x, memory, memory_key_padding_mask=hidden, tgt_is_causal=True)
        return F.linear(x, self.tokens.weight)

    def encode(self, source: Tensor) -> Tensor:
        """The memory (batch, seqlen, width) of source (batch, seqlen)."""
        hidden = self._hidden(source)
        x = self._embed(source, self.sinusoids[: source.shape[1]])
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=hidden)
        return x

    def loss(self, source: Tensor, target: Tensor, label_smoothing: float = 0.1) -> Tensor:
        """Mean over the target's tokens, each predicted from the true ones before it: the decoder reads the target shifted right.

        target: (batch, seqlen_t), ends with `end` and padding; the start token is put in front here.
        """
        shifted = F.pad(target[:, :-1], (1, 0), value=self.config.start)
        logits = self(source, shifted)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=self.config.padding, label_smoothing=label_smoothing)

    @torch.no_grad()
    def read(self, source: Tensor, capacity: int) -> Caches:
        """Caches for up to `capacity` target tokens, with the keys and values of the source, computed here once."""
        if capacity > self.config.longest:
            raise ValueError(f"capacity is {capacity}, and the model is made for {self.config.longest} tokens: raise longest in its config")
        return caches_of(self.decoder, self.encode(source), capacity, (~self._hidden(source)).sum(1))

    def decode(self, tokens: Tensor, caches: Caches, *, last: bool = False) -> Tensor:
        """The logits (batch, seqlen_t, vocabulary) of target tokens that follow those in the caches, which keep these too.

        last: of the last token alone, (batch, 1, vocabulary).
        """
        x = self._embed(tokens, self.sinusoids[caches.positions(tokens.shape[1], self.config.longest)])
        for layer, text, memory in zip(self.decoder, caches.text, caches.memory, strict=True):
            x = layer.decode(x, text, memory)
        return F.linear(x[:, -1:] if last else x, self.tokens.weight)

    def translate(self, source: Tensor, max_new_tokens: int) -> Tensor:
        """The greedy translation of source, (batch, at most max_new_tokens), `end` behind the end."""
        return generate(self, self._starts(source), max_new_tokens, caches=self.read(source, max_new_tokens), end=self.config.end)

    def translations(self, source: Tensor, max_new_tokens: int, beams: int = 4, length_penalty: float = 0.6) -> Hypotheses:
        """The best translations of source that beam search finds, with the paper's settings."""
        caches = self.read(source, max_new_tokens)
        start, end = self._starts(source), self.config.end
        return beam_search(self, start, max_new_tokens, beams=beams, caches=caches, end=end, length_penalty=length_penalty)

    def _starts(self, source: Tensor) -> Tensor:
        return source.new_full((source.shape[0], 1), self.config.start)

    def _hidden(self, source: Tensor) -> Tensor:
        """Where source (batch, seqlen) is padding: behind the last token that is none."""
        check_length("source", source, self.config.longest)
        return (source != self.config.padding).flip(1).cumsum(1).flip(1) == 0

    def _embed(self, tokens: Tensor, sinusoids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.tokens(tokens) * self.config.width**0.5 + sinusoids)
        return x


def warm_up(step: int, width: int, warm_up_steps: int = 4000) -> float:
    """The learning rate of step 1, 2, ...: linear up to warm_up_steps, then falling with the root of the step."""
    return float(width**-0.5 * min(step**-0.5, step * warm_up_steps**-1.5))
