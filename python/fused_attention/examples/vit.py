"""A ViT that learns to read scikit-learn's handwritten digits, 8 by 8 pixels each.

    python -m fused_attention.examples.vit --out vit-run

It prints the share of digits read right among those it has not seen, and those that it misread.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention.models import ViT, ViTConfig

from .torch_layers import TorchLayer
from .training import Run, arguments, console, cosine, needed, time_beside

STEPS = 1500
BATCH = 64
CONFIG = ViTConfig(10, image=8, patch=2, channels=1, width=64, heads=4, layers=3, feed_forward=128)


class Digits(NamedTuple):
    """images: (count, 1, 8, 8), within 0 ... 1; names: (count,), 0 ... 9."""

    images: Tensor
    names: Tensor


def digits(seed: int) -> tuple[Digits, Digits]:
    """Four fifths of the images to learn from, in an order of the seed, and a fifth to be tested on."""
    bunch = needed("sklearn.datasets").load_digits()
    images, names = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    learn, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return Digits(images[learn], names[learn]), Digits(images[test], names[test])


def shifted(images: Tensor, generator: torch.Generator, share: float = 0.3) -> Tensor:
    """A share of the images moved by up to a pixel either way; of all, so small a model would learn less in this time."""
    count = len(images)
    moved = torch.rand(count, 1, 1, generator=generator) < share
    down, right = torch.where(moved, torch.randint(3, (2, count, 1, 1), generator=generator), 1)
    padded, pixels = F.pad(images, (1, 1, 1, 1)), torch.arange(8)
    return padded[torch.arange(count)[:, None, None], 0, down + pixels[:, None], right + pixels][:, None]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("A ViT that learns to read handwritten digits.", steps=STEPS).parse_args(argv)
    torch.manual_seed(options.seed)
    learn, test = digits(options.seed)
    model = ViT(CONFIG).to(options.device)

    def batch(generator: torch.Generator) -> Digits:
        chosen = torch.randint(len(learn.names), (BATCH,), generator=generator)
        return Digits(shifted(learn.images[chosen], generator).to(options.device), learn.names[chosen].to(options.device))

    def loss(model: ViT, batch: Digits) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.names)

    run = Run(model, loss, batch, cosine(2e-3, STEPS, 50), options)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {len(learn.names):,} images.")
    run.train()
    with torch.no_grad():
        read = model(test.images.to(options.device)).argmax(-1).cpu()
    right = (read == test.names).float().mean().item()
    console.print(f"Of {len(read)} digits it has not seen it reads {right:.1%} right.")
    if options.out is not None:
        draw_misread(test, read, options.out / "misread.png")
    time_beside(run, ViT(CONFIG, layer=TorchLayer))
    return {"losses": run.losses, "right": right}


def draw_misread(test: Digits, read: Tensor, path: Any) -> None:
    """Writes a PNG of the digits misread, under what was read and what they are; of the first ones where none was."""
    from matplotlib.figure import Figure

    shown = (read != test.names).nonzero().flatten()[:12].tolist() or list(range(12))
    figure = Figure(figsize=(1.2 * len(shown), 1.6), dpi=120, layout="constrained")
    for axes, index in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(test.images[index, 0], cmap="gray_r")
        axes.set_title(f"read {read[index]}\nis {test.names[index]}", fontsize=8)
        axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
