"""Speech as Whisper hears it: the energy in bands as wide as the ear's, a hundred times a second, in powers of ten.

    power = |stft(audio)|²,   mel = filters · power,   log mel = max(log10 mel, highest - 8) / 4 + 1

Sources: Radford et al., 2022, https://arxiv.org/abs/2212.04356, section 2.2; the scale and the areas, Slaney, "Auditory Toolbox", 1998
"""

import math

import torch
from torch import Tensor

SAMPLE_RATE = 16000
WINDOW, HOP = 400, 160  # 25 and 10 milliseconds


def log_mel(audio: Tensor, mels: int = 80) -> Tensor:
    """audio: floating (..., samples) at 16 kHz, within -1 ... 1 -> (..., mels, samples // 160), about -1 ... 1, of at least float32."""
    if not audio.is_floating_point() or audio.dim() == 0:
        raise TypeError(
            f"audio is {audio.dtype}, {audio.dim()}-dimensional, expected floating (..., samples) within -1 ... 1: scale integers"
        )
    if audio.shape[-1] <= WINDOW // 2:
        raise ValueError(f"audio has {audio.shape[-1]} samples, expected more than {WINDOW // 2}: pad it with zeros")
    audio = audio.to(torch.promote_types(audio.dtype, torch.float32))
    window = torch.hann_window(WINDOW, dtype=audio.dtype, device=audio.device)
    stft = torch.stft(audio.reshape(-1, audio.shape[-1]), WINDOW, HOP, window=window, return_complex=True)
    power = stft[..., :-1].abs() ** 2
    power = power.reshape(*audio.shape[:-1], *power.shape[1:])
    logs = (mel_filters(mels).to(power) @ power).clamp(min=1e-10).log10()
    return torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - 8.0) / 4.0 + 1.0


def mel_filters(mels: int, *, sample_rate: int = SAMPLE_RATE, window: int = WINDOW) -> Tensor:
    """Triangles of unit area, each from the middle of the band below to that of the band above: (mels, window // 2 + 1), float64."""
    highest = _mel(sample_rate / 2)
    corners = torch.tensor([_hertz(highest * band / (mels + 1)) for band in range(mels + 2)], dtype=torch.float64)
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0.0) * (2.0 / (high - low))


# Slaney's scale is linear up to 1000 Hz, 15 mels, and logarithmic above, 27 mels for a factor of 6.4.
def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)


def _hertz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
