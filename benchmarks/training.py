"""The real run: a small GPT on the sources of Python's standard library, built twice, from our layers and from torch's.

same weights, batches, dropout 0, fp32, AdamW   ->   |loss - loss of torch's| <= 1e-3 over the first 50 steps,
                                                     means of the last 50 steps within 1 %
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attention
from fused_attention.examples.standard_library import corpus

from .timing import Protocol, Timing

VOCABULARY = 256  # bytes
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 128, 8
LEARNING_RATE, WARM_UP_STEPS, EMBEDDING_SCALE = 1e-3, 20, 0.02  # GPT-2's scale
CORPUS_BYTES = 4 * 2**20
COMPARED_STEPS = 50
LARGEST_EARLY_DIFFERENCE, LARGEST_LATE_DIFFERENCE = 1e-3, 0.01
SAMPLE_BYTES, TEMPERATURE, PROMPT = 160, 0.8, b"def "


class Decoder(nn.Module):
    """A GPT over bytes: embeddings, causal layers, the logits of the next byte."""

    mask: Tensor | None

    def __init__(self, layer: Callable[..., nn.Module], *, needs_mask: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            layer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True) for _ in range(LAYERS)
        )
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=EMBEDDING_SCALE)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        # torch.nn takes is_causal as a hint about a mask.
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT) if needs_mask else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seqlen) of bytes -> logits (batch, seqlen, 256)."""
        seqlen = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:seqlen]
        mask = None if self.mask is None else self.mask[:seqlen, :seqlen]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True)
class Training:
    """What both runs did; losses a step, seconds a step."""

    steps: int
    corpus_bytes: int
    corpus_sha256: str
    parameters: int
    settings: dict[str, Any]
    losses: list[float]
    torch_losses: list[float]
    step: Timing
    torch_step: Timing
    early_difference: float  # largest |difference| of the losses over the first 50 steps
    late_mean: float  # our mean loss over the last 50
    late_difference: float  # relative difference from torch's mean
    sample: str
    failures: list[str]

    @property
    def speedup(self) -> float:
        return self.torch_step.median / self.step.median


def train(steps: int, protocol: Protocol, seed: int, say: Callable[[int], None] = lambda step: None) -> Training:
    """Trains both models a step each in turns, and compares them."""
    text = corpus(CORPUS_BYTES)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    ours, twin = _models(seed)
    generator = torch.Generator().manual_seed(seed)
    runs = [_Learner(model) for model in (ours, twin)]
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        window = data[starts[:, None] + torch.arange(CONTEXT + 1)]
        # In turns, and in turns first: what a step leaves in the caches helps neither more than the other.
        for learner in runs if step % 2 == 0 else reversed(runs):
            learner.step(step, window[:, :-1], window[:, 1:], protocol)
        say(step + 1)
    first, second = runs
    compared = min(COMPARED_STEPS, steps)
    early = max(abs(a - b) for a, b in zip(first.losses[:compared], second.losses[:compared], strict=True))
    late, late_twin = (statistics.fmean(learner.losses[-compared:]) for learner in runs)
    return Training(
        steps=steps,
        corpus_bytes=len(text),
        corpus_sha256=hashlib.sha256(text).hexdigest(),
        parameters=sum(parameter.numel() for parameter in ours.parameters()),
        settings={"width": WIDTH, "heads": HEADS, "layers": LAYERS, "context": CONTEXT, "batch": BATCH, "learning_rate": LEARNING_RATE},
        losses=first.losses,
        torch_losses=second.losses,
        step=Timing.of(first.seconds),
        torch_step=Timing.of(second.seconds),
        early_difference=early,
        late_mean=late,
        late_difference=abs(late - late_twin) / late_twin,
        sample=_sample(ours, seed),
        failures=judge(early, late, late_twin, first.losses),
    )


def judge(early: float, late: float, late_twin: float, losses: list[float]) -> list[str]:
    """A sentence for each of the run's conditions that did not hold."""
    found = []
    if not all(math.isfinite(loss) for loss in losses):
        found.append("a loss of ours is not finite")
    if not early <= LARGEST_EARLY_DIFFERENCE:
        found.append(f"losses differ by {early:.2g} within the first {COMPARED_STEPS} steps, expected at most {LARGEST_EARLY_DIFFERENCE}")
    if not abs(late - late_twin) <= LARGEST_LATE_DIFFERENCE * late_twin:
        found.append(f"the last steps' mean loss is {late:.4f} with our layers and {late_twin:.4f} with torch's, expected within 1 %")
    if not late < losses[0]:
        found.append(f"nothing was learned: the loss began at {losses[0]:.3f} and ended at {late:.3f}")
    return found


def _models(seed: int) -> tuple[Decoder, Decoder]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = Decoder(nn.TransformerEncoderLayer, needs_mask=True)
    ours = Decoder(fused_attention.TransformerLayer, needs_mask=False)
    ours.load_state_dict(twin.state_dict())
    return ours, twin


class _Learner:
    """A model with its optimiser, its losses and its times."""

    def __init__(self, model: Decoder) -> None:
        self._model = model.train()
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, index: int, tokens: Tensor, targets: Tensor, protocol: Protocol) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (index + 1) / WARM_UP_STEPS)
        start = protocol.now()
        loss = F.cross_entropy(self._model(tokens).flatten(0, 1), targets.flatten())
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self.seconds.append(protocol.now() - start)
        self.losses.append(loss.item())


@torch.no_grad()
def _sample(model: Decoder, seed: int) -> str:
    """Text the trained model goes on to write after the prompt."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(list(PROMPT))[None]
    for _ in range(SAMPLE_BYTES):
        logits = model(tokens[:, -CONTEXT:])[:, -1] / TEMPERATURE
        tokens = torch.cat([tokens, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)], dim=1)
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")
