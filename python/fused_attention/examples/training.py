"""How the examples train: a loop with a progress bar that can be resumed, its curve drawn, and its time per step beside torch's layers.

a run of n steps, saved, and resumed for m more  =  a run of n + m steps, to the bit
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fused_attention.models import save

console = Console(highlight=False)


def arguments(description: str, steps: int) -> argparse.ArgumentParser:
    """What every example takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="how long to train")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the model, its curve and the state that --resume goes on from")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, up to --steps")
    parser.add_argument("--rounds", type=int, default=7, help="steps timed of ours and of torch's layers each; 0 for none")
    return parser


@dataclass
class Run:
    """A model in training. loss(model, batch) is what falls; batch(generator) draws the next one; rate(step) is of step 1, 2, ..."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batch: Callable[[torch.Generator], Any]
    rate: Callable[[int], float]
    options: argparse.Namespace
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(self.options.seed)

    def train(self) -> None:
        """Up to options.steps, from where the folder's run stood if options say so; the state is written at the end."""
        if self.options.resume:
            if self.options.out is None:
                raise ValueError("--resume goes on with the run in a folder: say which, with --out")
            self._restore(self.options.out / "run.pt")
        self.model.train()
        columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=self.options.steps, completed=len(self.losses), loss=math.nan)
            while len(self.losses) < self.options.steps:
                self.losses.append(self.step())
                progress.update(bar, advance=1, loss=self.losses[-1])
        self.model.eval()
        if self.options.out is not None:
            self._write(self.options.out)

    def step(self) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(len(self.losses) + 1)
        loss = self.loss(self.model, self.batch(self.generator))
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return loss.item()

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save(self.model, folder / "model.safetensors")
        draw_curve(self.losses, folder / "loss.png")
        random = {"batches": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.options.device.startswith("cuda"):
            random["cuda"] = torch.cuda.get_rng_state(self.options.device)
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "losses": self.losses, "random": random}
        torch.save(state, folder / "run.pt")

    def _restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.losses = state["losses"]
        self.generator.set_state(state["random"]["batches"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.options.device)


def needed(module: str) -> Any:
    """A module of a package that the extra `examples` brings; an ImportError that says so where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is not installed, and this example needs it: pip install fused-attention[examples]") from None


def cosine(peak: float, steps: int, warm_up_steps: int) -> Callable[[int], float]:
    """A rate that rises to its peak in warm_up_steps, and falls to a tenth of it along a cosine."""

    def rate(step: int) -> float:
        if step < warm_up_steps:
            return peak * step / warm_up_steps
        fallen = (step - warm_up_steps) / max(1, steps - warm_up_steps)
        return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, fallen)))

    return rate


def time_beside(run: Run, twin: nn.Module) -> None:
    """Prints the time per step of the run's model and of its twin of torch's layers: the same weights and batches, in turns."""
    rounds = run.options.rounds
    if not rounds:
        return
    twin.load_state_dict(run.model.state_dict())
    contenders = {"ours": Run(run.model, run.loss, run.batch, run.rate, run.options)}
    contenders["torch"] = Run(twin.to(run.options.device), run.loss, run.batch, run.rate, run.options)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        # In turns, and in turns first: what a step leaves in the caches helps neither more than the other.
        for name, contender in list(contenders.items())[:: 1 if number % 2 else -1]:
            contender.model.train()
            start = time.perf_counter()
            contender.step()  # ends with the loss on the host, so a GPU has finished
            seconds[name].append(time.perf_counter() - start)
    run.model.load_state_dict(weights)
    run.model.eval()
    ours, theirs = (statistics.median(seconds[name][1:]) * 1e3 for name in ("ours", "torch"))
    threads = f"{torch.get_num_threads()} threads" if run.options.device == "cpu" else run.options.device
    console.print(
        f"A step takes {ours:.1f} ms, with torch's own layers {theirs:.1f} ms ({theirs / ours:.2f}x, {threads}, median of {rounds})."
    )


def draw_curve(losses: Sequence[float], path: Path) -> None:
    """Writes a PNG: the loss of every step, and its mean over the last twentieth of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="#cbd2d9", linewidth=0.8)
    width = max(1, len(losses) // 20)
    means = [statistics.fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]
    axes.plot(means, color="#0b6e99", linewidth=2)
    axes.set(xlabel="step", ylabel="loss (nats)")
    figure.savefig(path)
