"""A Transformer that learns to translate English into French from the messages of programs.

    pip download --no-deps --dest wheels Django pretix indico weblate
    python -m fused_attention.examples.translate wheels/*.whl --out translate-run

It prints the BLEU of messages that it has not seen, some of its translations, and draws where it looked while it wrote one.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attention.models import Transformer, TransformerConfig, warm_up

from .catalogues import Pair, pairs
from .subwords import Subwords
from .torch_layers import TorchDecoderLayer, TorchLayer
from .training import Run, arguments, console, needed, time_beside

BATCH, LONGEST, VOCABULARY = 64, 90, 3000  # messages, characters, tokens
SIZES = {"width": 128, "heads": 4, "layers": 3, "feed_forward": 384, "dropout": 0.1}
WARM_UP_STEPS = 400


class Batch(NamedTuple):
    """Tokens (batch, seqlen) of both languages, each with the end, padded on the right."""

    source: Tensor
    target: Tensor


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments("A Transformer that learns to translate.", steps=3000)
    parser.add_argument("paths", nargs="+", type=Path, help="wheels or folders with gettext catalogues")
    parser.add_argument("--language", default="fr", help="what to translate English into")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=500, help="messages to be tested on")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    messages = pairs(options.paths, options.language, LONGEST)
    random.Random(options.seed).shuffle(messages)
    test, learn = messages[: options.held_out], messages[options.held_out :]
    subwords = Subwords((text for pair in learn for text in pair), VOCABULARY)
    config = TransformerConfig(len(subwords), **SIZES, longest=2 * LONGEST)  # type: ignore[arg-type]
    model = Transformer(config).to(options.device)
    encoded = [[torch.tensor([*subwords.encode(text), config.end]) for text in pair] for pair in learn]
    run = Run(model, lambda model, batch: model.loss(*batch), lambda g: draw(encoded, g, options.device), lambda step: 0.0, options)
    run.rate = lambda step: warm_up(step, config.width, WARM_UP_STEPS)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {len(learn):,} messages.")
    run.train()
    translated = translate(model, subwords, [pair.source for pair in test], options.beams)
    score = bleu(translated, [pair.target for pair in test])
    console.print(f"BLEU of {len(test)} messages it has not seen: {score:.1f}, with {options.beams} beams.")
    for pair, ours in list(zip(test, translated, strict=True))[:6]:
        console.print(f"  {pair.source}\n    -> {ours}\n    [{pair.target}]", markup=False)
    if options.out is not None:
        draw_looks(model, subwords, max(test[:40], key=lambda pair: len(pair.source)), options.out / "attention.png")
    time_beside(run, Transformer(config, encoder_layer=TorchLayer, decoder_layer=TorchDecoderLayer))
    return {"losses": run.losses, "bleu": score}


def draw(encoded: list[list[Tensor]], generator: torch.Generator, device: str) -> Batch:
    """A batch of messages of like length: of many that are drawn, those that stand together when sorted."""
    drawn = torch.randint(len(encoded), (8 * BATCH,), generator=generator).tolist()
    drawn.sort(key=lambda message: len(encoded[message][1]))
    first = BATCH * int(torch.randint(8, (1,), generator=generator))
    return Batch(*(padded([encoded[message][side] for message in drawn[first : first + BATCH]], device) for side in (0, 1)))


def padded(rows: list[Tensor], device: str | torch.device) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def translate(model: Transformer, subwords: Subwords, texts: Sequence[str], beams: int) -> list[str]:
    device, found = next(model.parameters()).device, []
    for first in range(0, len(texts), BATCH):
        rows = [torch.tensor([*subwords.encode(text), model.config.end]) for text in texts[first : first + BATCH]]
        best = model.translations(padded(rows, device), LONGEST, beams=beams).tokens[:, 0]
        found += [subwords.decode(tokens) for tokens in best.tolist()]
    return found


def bleu(translated: Sequence[str], truth: Sequence[str]) -> float:
    return float(needed("sacrebleu").BLEU().corpus_score(list(translated), [list(truth)]).score)


@contextmanager
def looks(model: Transformer) -> Iterator[list[Tensor]]:
    """Within it, a forward of the model adds each decoder layer's weights over the source: (batch, heads, seqlen_t, seqlen)."""
    seen: list[Tensor] = []
    hooks = []
    for layer in model.decoder:
        attention = layer.multihead_attn
        ask = {"need_weights": True, "average_attn_weights": False}
        hooks.append(attention.register_forward_pre_hook(lambda module, args, kwargs, ask=ask: (args, kwargs | ask), with_kwargs=True))
        hooks.append(attention.register_forward_hook(lambda module, args, out: seen.append(out[1])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def draw_looks(model: Transformer, subwords: Subwords, pair: Pair, path: Path) -> None:
    """Writes a PNG of what the model's own translation looked at: each layer's weights, the mean over its heads."""
    from matplotlib.figure import Figure

    device = next(model.parameters()).device
    source = torch.tensor([[*subwords.encode(pair.source), model.config.end]], device=device)
    written = model.translate(source, LONGEST)
    before = torch.nn.functional.pad(written[:, :-1], (1, 0), value=model.config.start)
    with looks(model) as weights:
        model(source, before)
    columns, rows = ([subwords.tokens[token] for token in tokens[0].tolist()] for tokens in (source, written))
    figure = Figure(figsize=(4.5 * len(weights), 5), dpi=120, layout="constrained")
    for number, (axes, weight) in enumerate(zip(figure.subplots(1, len(weights), squeeze=False)[0], weights, strict=True)):
        axes.imshow(weight[0].mean(0).cpu(), cmap="Blues", vmin=0)
        axes.set_xticks(range(len(columns)), columns, rotation=70)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(f"decoder layer {number + 1}")
    figure.savefig(path)


if __name__ == "__main__":
    main()
