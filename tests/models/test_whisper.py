"""Whisper: its decoder with a cache says what its forward says, and its ear hears a tone in the band of that pitch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fused_attention.models import Whisper, WhisperConfig, beam_search, generate, log_mel
from fused_attention.models.log_mel import mel_filters


def whisper() -> Whisper:
    torch.manual_seed(0)
    sizes = {"mels": 8, "audio_context": 12, "text_context": 9, "width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    config = WhisperConfig(11, **sizes, feed_forward=32)
    model = Whisper(config).double().eval()
    torch.nn.init.normal_(model.tokens.weight, std=0.5)
    return model


MELS = torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def test_whisper_decodes_what_its_forward_says():
    model, tokens = whisper(), torch.randint(11, (2, 9))
    caches = model.read(MELS, 9)
    with torch.no_grad():
        parts = [model.decode(tokens[:, a:b], caches) for a, b in itertools.pairwise((0, 4, 5, 9))]
        torch.testing.assert_close(torch.cat(parts, 1), model(MELS, tokens))


def test_whisper_writes():
    model, start = whisper(), torch.ones(2, 1, dtype=torch.long)
    written = generate(model, start, 6, caches=model.read(MELS, 6))
    tokens = start
    for _ in range(6):
        tokens = torch.cat([tokens, model(MELS, tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, tokens[:, 1:])
    assert torch.equal(beam_search(model, start, 6, beams=1, caches=model.read(MELS, 6)).tokens[:, 0], written)


def test_whispers_loss_leaves_padding_out():
    model, tokens = whisper(), torch.tensor([[1, 4, 5, 2, 0], [1, 2, 0, 0, 0]])
    log_p = model(MELS, tokens[:, :-1]).log_softmax(-1)
    expected = -torch.stack([log_p[0, 0, 4], log_p[0, 1, 5], log_p[0, 2, 2], log_p[1, 0, 2]]).mean()
    torch.testing.assert_close(model.loss(MELS, tokens, padding=0), expected)


def test_what_does_not_fit_is_said():
    model = whisper()
    with pytest.raises(ValueError, match="mels has 20 frames, expected 24: pad or cut"):
        model(MELS[..., :20], torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="tokens has 10 tokens, and the model has positions for 9"):
        model(MELS, torch.ones(2, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"capacity is 10, .*positions for 9 tokens"):
        model.read(MELS, 10)


def test_audio_of_any_shape_is_heard():
    audio = torch.randn(2, 3, 800, generator=torch.Generator().manual_seed(4))
    heard = log_mel(audio)
    assert heard.shape == (2, 3, 80, 5)
    torch.testing.assert_close(heard[1, 2], log_mel(audio[1, 2]))
    assert log_mel(audio.bfloat16()).dtype is torch.float32
    with pytest.raises(TypeError, match=r"audio is torch.int16, 3-dimensional, expected floating .*-1 \.\.\. 1"):
        log_mel((audio * 1000).short())
    with pytest.raises(ValueError, match="audio has 200 samples, expected more than 200: pad"):
        log_mel(audio[..., :200])


@pytest.mark.parametrize("hertz", [220.0, 880.0, 2500.0, 6000.0])
def test_a_tone_is_loudest_in_its_band(hertz):
    audio = 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(16000, dtype=torch.float64) / 16000)
    mels = log_mel(audio)
    assert mels.shape == (80, 100)
    filters = mel_filters(80)
    middle = (filters * torch.linspace(0, 8000, 201, dtype=torch.float64)).sum(1) / filters.sum(1)
    heard = middle[mels[:, 50].argmax()].item()
    assert abs(heard - hertz) <= 60 + 0.05 * hertz  # half a bin of the transform, half a band
    assert mels.max() - mels.min() <= 2.0 + 1e-9  # eight powers of ten, divided by four


def test_the_filters_have_one_area_and_hear_something():
    fine = mel_filters(80, window=16000)  # a bin every hertz: a sum is an integral
    torch.testing.assert_close(fine.sum(1), torch.ones(80, dtype=torch.float64), rtol=0.01, atol=0.0)
    filters = mel_filters(80)
    assert bool((filters >= 0).all())
    assert bool((filters.sum(1) > 0).all())


def test_louder_audio_is_louder_by_a_constant():
    audio = torch.randn(8000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_mel(10.0 * audio), log_mel(audio) + 0.5)  # two powers of ten, divided by four
