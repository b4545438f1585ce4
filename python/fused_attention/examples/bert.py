"""A BERT that learns to guess words hidden in the sources of Python's standard library.

    python -m fused_attention.examples.bert --out bert-run

It prints the share of hidden words that it guesses in files it has not seen, beside that of the likeliest word, and fills in a line.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_attention.models import BERT, BERTConfig, Cloze, hide_words

from .standard_library import corpus
from .torch_layers import TorchLayer
from .training import Run, arguments, console, cosine, time_beside

STEPS = 3000
VOCABULARY, CONTEXT, BATCH = 2000, 32, 64
SHARE = 0.25  # of the words are hidden: so few steps need more to learn from than BERT's 15 %
UNKNOWN, MASK = "<unknown>", "<mask>"
CONFIG = BERTConfig(VOCABULARY, context=CONTEXT, width=128, heads=4, layers=2, feed_forward=512, dropout=0.0, deviation=128**-0.5)
LINES = (
    "for name in self.<mask> :",
    "if not isinstance ( value , <mask> ) :",
    "def __init__ ( <mask> , name ) :",
    "raise <mask> ( message )",
)


class Words:
    """The most frequent words and signs of a text as numbers, all others as UNKNOWN."""

    def __init__(self, text: Sequence[str]) -> None:
        frequent = [word for word, _ in Counter(text).most_common(VOCABULARY - 2)]
        self.words = [UNKNOWN, MASK, *frequent]
        self.index = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: Sequence[str]) -> Tensor:
        return torch.tensor([self.index.get(word, 0) for word in text])

    def hide(self, text: Tensor, generator: torch.Generator) -> Cloze:
        return hide_words(text, self.index[MASK], VOCABULARY, share=SHARE, generator=generator)


def split(text: str) -> list[str]:
    """Words, and signs one by one."""
    return re.findall(rf"{MASK}|\w+|[^\w\s]", text)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("A BERT that learns to guess hidden words.", steps=STEPS).parse_args(argv)
    torch.manual_seed(options.seed)
    text = split(corpus(4 * 2**20).decode("utf-8", "replace"))
    seen, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]
    words = Words(seen)
    numbers, unseen = words.encode(seen), words.encode(held_out)
    model = BERT(CONFIG).to(options.device)

    def batch(generator: torch.Generator) -> Cloze:
        starts = torch.randint(len(numbers) - CONTEXT, (BATCH,), generator=generator)
        return on(words.hide(numbers[starts[:, None] + torch.arange(CONTEXT)], generator), options.device)

    run = Run(model, lambda model, cloze: model.loss(cloze), batch, cosine(2e-3, STEPS, 100), options)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {len(seen):,} words.")
    run.train()
    rows = unseen[: len(unseen) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:600]
    right, likeliest = guess(model, rows, words, options.seed)
    console.print(
        f"Of the words hidden in text that it has not seen it guesses {right:.1%}; always the likeliest would be {likeliest:.1%}."
    )
    for line in LINES:
        console.print("  " + fill(model, words, line), markup=False)
    time_beside(run, BERT(CONFIG, layer=TorchLayer))
    return {"losses": run.losses, "right": right, "likeliest": likeliest}


@torch.no_grad()
def guess(model: BERT, rows: Tensor, words: Words, seed: int) -> tuple[float, float]:
    """The shares of the hidden words, known ones, that are guessed, and that are the most frequent word."""
    device = next(model.parameters()).device
    cloze = on(words.hide(rows, torch.Generator().manual_seed(seed)), device)
    asked = cloze.asked & (cloze.words != 0)
    guessed = torch.cat([model(part).argmax(-1) for part in cloze.tokens.split(BATCH)])
    truth = cloze.words[asked]
    return (guessed[asked] == truth).float().mean().item(), (truth == 2).float().mean().item()


@torch.no_grad()
def fill(model: BERT, words: Words, line: str) -> str:
    """The line with its mask replaced by the likeliest known word."""
    tokens = words.encode(split(line))[None].to(next(model.parameters()).device)
    logits = model(tokens)[tokens == words.index[MASK]][0, : len(words.words)]
    logits[: words.index[MASK] + 1] = float("-inf")
    return line.replace(MASK, f"[{words.words[int(logits.argmax())]}]")


def on(cloze: Cloze, device: str | torch.device) -> Cloze:
    return Cloze(*(part.to(device) for part in cloze))


if __name__ == "__main__":
    main()
