"""A Whisper that learns to write down digits that it hears: spoken by espeak-ng where that is installed, else dialled on a telephone.

    python -m fused_attention.examples.speech --out speech-run

It prints the share of numbers that it writes down without a mistake, of ones it has not heard, and draws one as it heard it.
"""

import array
import io
import math
import shutil
import subprocess
import wave
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention.models import Whisper, WhisperConfig, generate, log_mel

from .torch_layers import TorchDecoderLayer, TorchLayer
from .training import Run, arguments, console, cosine, time_beside

SAMPLE_RATE, SECONDS, MOST_DIGITS, BATCH = 16000, 2.4, 4, 24
STEPS = 1200
NOISE = 0.02
PADDING, START, END, ZERO = 0, 1, 2, 3  # tokens; a digit is ZERO + digit
MELS = 40
FRAMES = int(SECONDS * 100)
SIZES = {"width": 96, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 192}
CONFIG = WhisperConfig(ZERO + 10, MELS, FRAMES // 2, MOST_DIGITS + 1, **SIZES)
VOICES, SPEEDS, PITCHES = ("en-us", "en-gb", "en-gb-scotland"), (150, 180, 210), (35, 50, 65)


class Spoken(NamedTuple):
    """mels: (batch, MELS, FRAMES); tokens: (batch, MOST_DIGITS + 2), start, digits, end and padding."""

    mels: Tensor
    tokens: Tensor


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("A Whisper that learns to write down digits.", steps=STEPS).parse_args(argv)
    torch.manual_seed(options.seed)
    say = voices() if shutil.which("espeak-ng") else dial
    model = Whisper(CONFIG).to(options.device)
    run = Run(
        model,
        lambda model, spoken: model.loss(spoken.mels, spoken.tokens, PADDING),
        lambda generator: speak(say, generator, BATCH, options.device),
        cosine(1e-3, STEPS, 100),
        options,
    )
    source = "a telephone's tones" if say is dial else "espeak-ng's voices"
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn from {source}.")
    run.train()
    test = speak(say, torch.Generator().manual_seed(options.seed + 1), 200, options.device)
    start = torch.full((200, 1), START, device=options.device)
    written = generate(model, start, MOST_DIGITS + 1, caches=model.read(test.mels, MOST_DIGITS + 1), end=END)
    right = sum(digits(ours) == digits(truth) for ours, truth in zip(written.tolist(), test.tokens[:, 1:].tolist(), strict=True)) / 200
    console.print(f"Of 200 numbers of up to {MOST_DIGITS} digits it writes down {right:.1%} without a mistake.")
    for ours, truth in list(zip(written.tolist(), test.tokens[:, 1:].tolist(), strict=True))[:4]:
        console.print(f"  said {digits(truth):{MOST_DIGITS}}  heard {digits(ours)}")
    if options.out is not None:
        draw_heard(test.mels[0], digits(written[0].tolist()), options.out / "heard.png")
    time_beside(run, Whisper(CONFIG, encoder_layer=TorchLayer, decoder_layer=TorchDecoderLayer))
    return {"losses": run.losses, "right": right}


def digits(tokens: Sequence[int]) -> str:
    """The digits up to the end."""
    text = [str(token - ZERO) if token >= ZERO else " " for token in tokens]
    return "".join(text[: tokens.index(END)] if END in tokens else text)


def speak(say: Callable[[int, torch.Generator], Tensor], generator: torch.Generator, count: int, device: str) -> Spoken:
    """Numbers of one to MOST_DIGITS digits, said with pauses of random lengths, in noise."""
    audio = NOISE * torch.randn(count, int(SECONDS * SAMPLE_RATE), generator=generator)
    tokens = torch.full((count, MOST_DIGITS + 2), PADDING)
    tokens[:, 0] = START
    for row in range(count):
        said = torch.randint(10, (int(torch.randint(1, MOST_DIGITS + 1, (1,), generator=generator)),), generator=generator).tolist()
        sounds = [say(digit, generator) for digit in said]
        room = audio.shape[1] - sum(map(len, sounds))
        pauses = torch.rand(len(said) + 1, generator=generator)
        place = 0.0
        for sound, pause in zip(sounds, (pauses / pauses.sum() * room).tolist(), strict=False):
            place += pause
            audio[row, int(place) : int(place) + len(sound)] += sound
            place += len(sound)
        tokens[row, 1 : len(said) + 2] = torch.tensor([*(ZERO + digit for digit in said), END])
    return Spoken(log_mel(audio.to(device), MELS), tokens.to(device))


def dial(digit: int, generator: torch.Generator) -> Tensor:
    """The two tones of a telephone's key (ITU-T Q.23), for 60 to 300 milliseconds, of any loudness."""
    low = (941, 697, 697, 697, 770, 770, 770, 852, 852, 852)[digit]
    high = (1336, 1209, 1336, 1477, 1209, 1336, 1477, 1209, 1336, 1477)[digit]
    length, loudness = torch.rand(2, generator=generator).tolist()
    time = torch.arange(int((0.06 + 0.24 * length) * SAMPLE_RATE)) / SAMPLE_RATE
    tones: Tensor = (0.05 + 0.25 * loudness) * (torch.sin(2 * math.pi * low * time) + torch.sin(2 * math.pi * high * time))
    return tones


def voices() -> Callable[[int, torch.Generator], Tensor]:
    """Says a digit in one of espeak-ng's voices, drawn anew each time; all are recorded here, once."""
    manners = [(voice, speed, pitch) for voice in VOICES for speed in SPEEDS for pitch in PITCHES]
    recorded = [[record(str(digit), *manner) for manner in manners] for digit in range(10)]
    return lambda digit, generator: recorded[digit][int(torch.randint(len(manners), (1,), generator=generator))]


def record(text: str, voice: str, speed: int, pitch: int) -> Tensor:
    """What espeak-ng says, at SAMPLE_RATE, without the silence around it, of up to half a second."""
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), text]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    # The header of a stream holds no length that could be true, so what follows it is read whole.
    with wave.open(io.BytesIO(said)) as file:
        rate = file.getframerate()
    samples = torch.tensor(array.array("h", said[44 : 44 + (len(said) - 44) // 2 * 2])).float() / 2**15
    sound = F.interpolate(samples[None, None], scale_factor=SAMPLE_RATE / rate, mode="linear")[0, 0]
    loud = (sound.abs() > 0.01).nonzero()
    return sound[int(loud[0]) : int(loud[-1]) + 1][: int(SAMPLE_RATE * (SECONDS - 0.2) / MOST_DIGITS)]


def draw_heard(mels: Tensor, text: str, path: Any) -> None:
    """Writes a PNG: the log mels (MELS, FRAMES), under what was written down."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(mels.cpu(), origin="lower", aspect="auto", cmap="magma", extent=(0, SECONDS, 0, MELS))
    axes.set(title=f"heard: {text}", xlabel="seconds", ylabel="mel band")
    figure.savefig(path)


if __name__ == "__main__":
    main()
