"""Whisper: an encoder that hears speech, and a decoder that writes it down, looking at all that was heard.

    memory = norm(layers(gelu(conv(gelu(conv(log mel)))) + sinusoids)),   logits = norm(layers(tokens[t] + positions, memory)) tokensᵀ

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, https://arxiv.org/abs/2212.04356
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.layers import TransformerDecoderLayer, TransformerLayer

from .caches import Caches, caches_of
from .lengths import check_length


@dataclass(frozen=True)
class WhisperConfig:
    """audio_context: rows of the memory, one for two frames of the log-mel spectrogram; 1500 are 30 seconds."""

    vocabulary: int
    mels: int = 80
    audio_context: int = 1500
    text_context: int = 448
    width: int = 384
    heads: int = 6
    encoder_layers: int = 4
    decoder_layers: int = 4
    feed_forward: int = 1536
    dropout: float = 0.0


class Whisper(nn.Module):
    """log mels (batch, mels, 2 · audio_context), tokens (batch, seqlen) -> logits (batch, seqlen, vocabulary) of what follows each.

    encoder_layer, decoder_layer: build layers as ours do.
    """

    sinusoids: Tensor

    def __init__(
        self, config: WhisperConfig, *, encoder_layer: Any = TransformerLayer, decoder_layer: Any = TransformerDecoderLayer
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        shape = width, config.heads, config.feed_forward, config.dropout, F.gelu
        self.conv1 = nn.Conv1d(config.mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("sinusoids", _sinusoids(config.audio_context, width))  # saved, as some were trained
        self.encoder: Iterable[Any] = nn.ModuleList(
            encoder_layer(*shape, batch_first=True, norm_first=True) for _ in range(config.encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(torch.randn(config.text_context, width) * 0.02)
        self.decoder: Iterable[Any] = nn.ModuleList(
            decoder_layer(*shape, batch_first=True, norm_first=True) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, mels: Tensor, tokens: Tensor) -> Tensor:
        check_length("tokens", tokens, self.config.text_context)
        memory = self.encode(mels)
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.decoder:
            x = layer(x, memory, tgt_is_causal=True)
        return F.linear(self.norm(x), self.tokens.weight)

    def encode(self, mels: Tensor) -> Tensor:
        """The memory (batch, audio_context, width) of log mels (batch, mels, 2 · audio_context)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).transpose(1, 2)
        if x.shape[1] != self.config.audio_context:
            raise ValueError(f"mels has {mels.shape[-1]} frames, expected {2 * self.config.audio_context}: pad or cut the audio first")
        x = x + self.sinusoids
        for layer in self.encoder:
            x = layer(x)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def loss(self, mels: Tensor, tokens: Tensor, padding: int) -> Tensor:
        """Mean over tokens (batch, seqlen + 1), the first being the start: each is predicted from the true ones before it."""
        logits = self(mels, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=padding)

    @torch.no_grad()
    def read(self, mels: Tensor, capacity: int) -> Caches:
        """Caches for up to `capacity` tokens, with the keys and values of what was heard, computed here once."""
        if capacity > self.config.text_context:
            raise ValueError(f"capacity is {capacity}, and there are positions for {self.config.text_context} tokens: shorten the text")
        return caches_of(self.decoder, self.encode(mels), capacity)

    def decode(self, tokens: Tensor, caches: Caches, *, last: bool = False) -> Tensor:
        """The logits (batch, seqlen, vocabulary) of tokens that follow those in the caches, which keep these too.

        last: of the last token alone, (batch, 1, vocabulary).
        """
        x = self.tokens(tokens) + self.positions[caches.positions(tokens.shape[1], self.config.text_context)]
        for layer, text, memory in zip(self.decoder, caches.text, caches.memory, strict=True):
            x = layer.decode(x, text, memory)
        return F.linear(self.norm(x[:, -1:] if last else x), self.tokens.weight)


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's: all sines, then all cosines, of wavelengths from 2π to 10000 · 2π."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).to(torch.get_default_dtype())
