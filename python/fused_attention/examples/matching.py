"""A ViLBERT that learns which written name belongs to which handwritten digit: the letters look at the image, and the image at the letters.

    python -m fused_attention.examples.matching --out matching-run

It prints for how many images that it has not seen the right name matches best, of the ten.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention.models import ViLBERT, ViLBERTConfig

from .torch_layers import TorchLayer
from .training import Run, arguments, console, cosine, time_beside
from .vit import digits, shifted

STEPS = 1500
BATCH, PATCH = 48, 2
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " " + "".join(sorted(set("".join(NAMES))))  # the blank is padding
LONGEST = max(map(len, NAMES))
CONFIG = ViLBERTConfig(
    len(LETTERS), LONGEST, regions=16, features=PATCH**2, width=48, heads=4, text_layers=1, layers=2, feed_forward=96, dropout=0.0
)
SPELLED = torch.tensor([[LETTERS.index(letter) for letter in name.ljust(LONGEST)] for name in NAMES])


class Pairs(NamedTuple):
    """words: (count, LONGEST); image: (count, regions, features); together: (count,), 1 where they belong together, else 0."""

    words: Tensor
    image: Tensor
    together: Tensor


def regions(images: Tensor) -> Tensor:
    """The patches of images (count, 1, 8, 8), each a row of pixels."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("A ViLBERT that learns the names of handwritten digits.", steps=STEPS).parse_args(argv)
    torch.manual_seed(options.seed)
    learn, test = digits(options.seed)
    model = ViLBERT(CONFIG).to(options.device)

    def batch(generator: torch.Generator) -> Pairs:
        """As many pairs that belong together as pairs that do not."""
        chosen = torch.randint(len(learn.names), (BATCH,), generator=generator)
        together = torch.arange(BATCH) % 2
        other = (learn.names[chosen] + torch.randint(1, 10, (BATCH,), generator=generator)) % 10
        said = torch.where(together == 1, learn.names[chosen], other)
        pairs = SPELLED[said], regions(shifted(learn.images[chosen], generator)), together.float()
        return Pairs(*(part.to(options.device) for part in pairs))

    def loss(model: ViLBERT, batch: Pairs) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch.words, batch.image, batch.words == 0), batch.together)

    run = Run(model, loss, batch, cosine(1.5e-3, STEPS, 100), options)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {len(learn.names):,} images and ten names.")
    run.train()
    with torch.no_grad():
        image = regions(test.images).to(options.device)
        words = [name.expand(len(image), -1).to(options.device) for name in SPELLED]
        matches = torch.stack([model(name, image, name == 0) for name in words], 1).cpu()
    right = (matches.argmax(1) == test.names).float().mean().item()
    console.print(f"Of {len(matches)} images it has not seen, {right:.1%} match their own name best.")
    if options.out is not None:
        draw_matches(matches, test.names, options.out / "matches.png")
    time_beside(run, ViLBERT(CONFIG, layer=TorchLayer))
    return {"losses": run.losses, "right": right}


def draw_matches(matches: Tensor, names: Tensor, path: Any) -> None:
    """Writes a PNG: how well the images of each digit match each name, as a mean probability."""
    from matplotlib.figure import Figure

    means = torch.stack([matches.sigmoid()[names == digit].mean(0) for digit in range(10)])
    figure = Figure(figsize=(5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(means, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(10), NAMES, rotation=60)
    axes.set_yticks(range(10), [str(digit) for digit in range(10)])
    axes.set(xlabel="name", ylabel="image of")
    figure.savefig(path)


if __name__ == "__main__":
    main()
