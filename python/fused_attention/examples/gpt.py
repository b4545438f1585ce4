"""A GPT that learns to write Python from the standard library's sources, character by character, and then writes.

    python -m fused_attention.examples.gpt --out gpt-run

It prints the bits a character takes on text it has not seen, what it writes, and how much faster it writes with a cache.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_attention.models import GPT, GPTConfig, generate

from .standard_library import corpus
from .torch_layers import TorchLayer
from .training import Run, arguments, console, cosine, time_beside

STEPS = 1500
CONTEXT, BATCH = 192, 12
CONFIG = GPTConfig(vocabulary=128, context=CONTEXT, width=128, heads=4, layers=4, dropout=0.0)
PROMPT = "def read_"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("A GPT that learns to write Python.", steps=STEPS).parse_args(argv)
    torch.manual_seed(options.seed)
    text = encode(corpus(4 * 2**20).decode("utf-8", "replace"))
    seen, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]
    model = GPT(CONFIG).to(options.device)

    def batch(generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(seen) - CONTEXT, (BATCH,), generator=generator)
        return seen[starts[:, None] + torch.arange(CONTEXT + 1)].to(options.device)

    run = Run(model, lambda model, tokens: model.loss(tokens), batch, cosine(2e-3, STEPS, 50), options)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {len(seen):,} characters.")
    run.train()
    bits = bits_per_character(model, held_out)
    console.print(f"A character it has not seen takes {bits:.2f} bits (a guess among 128 takes 7).")
    console.print("It writes:\n" + write(model, PROMPT, CONTEXT - len(PROMPT), options.seed), markup=False)
    faster = time_writing(model)
    time_beside(run, GPT(CONFIG, layer=TorchLayer))
    return {"losses": run.losses, "bits": bits, "faster": faster}


def encode(text: str) -> Tensor:
    """A token a character: its ASCII code, that of ? for all others."""
    return torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.long)


@torch.no_grad()
def bits_per_character(model: GPT, text: Tensor, windows: int = 40) -> float:
    rows = text[: windows * CONTEXT + 1].to(next(model.parameters()).device).unfold(0, CONTEXT + 1, CONTEXT)
    return model.loss(rows).item() / math.log(2)


def write(model: GPT, prompt: str, length: int, seed: int = 0) -> str:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    written = generate(model, encode(prompt)[None].to(device), length, temperature=0.8, top_p=0.95, generator=generator)
    return prompt + bytes(written[0].tolist()).decode()


@torch.no_grad()
def time_writing(model: GPT) -> float:
    """Prints and returns how many times faster than reading all again a token is written with the cache."""
    device = next(model.parameters()).device
    text, new = torch.zeros(1, CONTEXT // 2, dtype=torch.long, device=device), CONTEXT // 2
    generate(model, text, 2)
    start = time.perf_counter()
    cached = generate(model, text, new)
    middle = time.perf_counter()
    for _ in range(new):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    again = time.perf_counter() - middle
    same = "the same text" if torch.equal(text[:, -new:], cached) else "texts that differ by rounding"
    console.print(f"With the cache a character takes {(middle - start) / new * 1e3:.2f} ms, without {again / new * 1e3:.2f} ms: {same}.")
    return again / (middle - start)


if __name__ == "__main__":
    main()
