"""The examples run from beginning to end, briefly; torch's layers in them compute what ours do; a resumed run goes on to the bit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed: pip install fused-attention[examples]")

from fused_attention.examples import bert, gpt, matching, speech, translate, vit
from fused_attention.examples.catalogues import Pair
from fused_attention.examples.subwords import Subwords
from fused_attention.examples.torch_layers import TorchDecoderLayer, TorchLayer
from fused_attention.examples.training import Run, cosine, time_beside
from fused_attention.models import BERT, GPT, Transformer, TransformerConfig, ViLBERT, Whisper

BRIEF = ["--steps", "3", "--rounds", "1"]
TINY = replace(gpt.CONFIG, width=16, heads=2, layers=1, dropout=0.2)
PAIRS = [Pair(f"number {n} of {n * n}", f"numéro {n} de {n * n}") for n in range(40)]


def sizes(config: Any, **more: int) -> Any:
    return replace(config, width=16, heads=2, feed_forward=32, **more)


def learned(result: dict[str, Any], capsys: pytest.CaptureFixture[str], *sentences: str) -> None:
    assert len(result["losses"]) == 3
    assert all(0.0 < loss < 20.0 for loss in result["losses"])
    printed = " ".join(capsys.readouterr().out.split())
    for sentence in (*sentences, "A step takes", "with torch's own layers"):
        assert sentence in printed


def test_gpt(monkeypatch, capsys):
    monkeypatch.setattr(gpt, "CONFIG", replace(gpt.CONFIG, width=16, heads=2, layers=1))
    monkeypatch.setattr(gpt, "corpus", lambda size: b"def f(x):\n    return x\n" * 400)
    result = gpt.main(BRIEF)
    assert 0.0 < result["bits"] < 10.0
    learned(result, capsys, "It writes: def read_", "the same text")


def test_bert(monkeypatch, capsys):
    monkeypatch.setattr(bert, "CONFIG", sizes(bert.CONFIG, layers=1))
    monkeypatch.setattr(bert, "corpus", lambda size: b"for name in self . names : raise ValueError ( message )\n" * 600)
    result = bert.main(BRIEF)
    assert 0.0 <= result["right"] <= 1.0
    assert 0.02 < result["likeliest"] < 0.3  # one of eleven words
    learned(result, capsys, "raise [", "for name in self.[")


def test_speech(monkeypatch, capsys):
    monkeypatch.setattr(speech, "CONFIG", sizes(speech.CONFIG, encoder_layers=1, decoder_layers=1))
    monkeypatch.setattr(speech.shutil, "which", lambda program: None)
    learned(speech.main(BRIEF), capsys, "a telephone's tones", "without a mistake", "said")


@pytest.mark.parametrize("example", [vit, matching], ids=["vit", "matching"])
def test_digits(example, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install fused-attention[examples]")
    result = example.main(BRIEF)
    assert 0.0 <= result["right"] <= 1.0
    learned(result, capsys, "it has not seen")


def test_translate(monkeypatch, capsys):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install fused-attention[examples]")
    monkeypatch.setattr(translate, "SIZES", {"width": 16, "heads": 2, "layers": 1, "feed_forward": 32, "dropout": 0.1})
    monkeypatch.setattr(translate, "pairs", lambda paths, language, longest: list(PAIRS))
    result = translate.main([*BRIEF, "--held-out", "4", "--beams", "2", "some.whl"])
    assert 0.0 <= result["bleu"] <= 100.0
    learned(result, capsys, "BLEU of 4 messages", "-> ")


def test_an_example_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(translate.needed.__globals__, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"sklearn is not installed.*fused-attention\[examples\]"):
        vit.digits(0)


def test_batches_hold_whole_messages_of_like_length():
    subwords = Subwords((text for pair in PAIRS for text in pair), 60)
    encoded = [[torch.tensor([*subwords.encode(text), 2]) for text in pair] for pair in PAIRS]
    batch = translate.draw(encoded, torch.Generator().manual_seed(0), "cpu")
    assert len(batch.source) == len(batch.target) == translate.BATCH
    rows = zip(*(tokens.tolist() for tokens in batch), strict=True)
    assert {Pair(*(subwords.decode(row) for row in both)) for both in rows} <= set(PAIRS)


def test_where_a_translation_looked_is_what_the_layers_weigh():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(11, 16, 2, 2, 32)).eval()
    source, target = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[1, 7]])
    with torch.no_grad(), translate.looks(model) as weights:
        looked = model(source, target)
    assert [weight.shape for weight in weights] == [(1, 2, 2, 4)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, 2, 2))
    torch.testing.assert_close(model(source, target), looked)
    assert len(weights) == 2  # behind the context nothing is kept


def test_torchs_layers_compute_what_ours_do():
    """Else the times beside each other would be of unlike work."""
    torch.manual_seed(0)
    tokens, mels = torch.randint(3, 11, (2, 6)), torch.randn(2, 8, 24)
    hidden = torch.arange(6) >= torch.tensor([[6], [4]])
    speaking = replace(sizes(speech.CONFIG), mels=8, audio_context=12, text_context=6, encoder_layers=1, decoder_layers=1)
    reading = replace(sizes(matching.CONFIG), vocabulary=11, context=6, layers=1)
    both = {"encoder_layer": TorchLayer, "decoder_layer": TorchDecoderLayer}
    for build, config, layers, inputs in (
        (GPT, replace(gpt.CONFIG, width=16, heads=2, layers=1, context=6), {"layer": TorchLayer}, (tokens, torch.tensor([0, 2]))),
        (GPT, replace(gpt.CONFIG, width=16, heads=2, layers=1, context=6), {"layer": TorchLayer}, (tokens,)),
        (BERT, replace(sizes(bert.CONFIG, layers=1), vocabulary=11), {"layer": TorchLayer}, (tokens, hidden)),
        (ViLBERT, reading, {"layer": TorchLayer}, (tokens, torch.randn(2, 16, 4), hidden)),
        (Transformer, TransformerConfig(11, 16, 2, 1, 32, dropout=0.0), both, (tokens.masked_fill(hidden, 0), tokens)),
        (Whisper, speaking, both, (mels, tokens)),
    ):
        ours, theirs = build(config), build(config, **layers)
        theirs.load_state_dict(ours.state_dict())
        got, expected = ours(*inputs), theirs(*inputs)
        if build is GPT and len(inputs) == 2:  # what padding itself says is nobody's concern, and torch's is nan
            got, expected = got[0], expected[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def tiny_run(steps: int, **options: Any) -> Run:
    torch.manual_seed(5)
    options = {"steps": steps, "seed": 1, "device": "cpu", "out": None, "resume": False, "rounds": 2} | options
    run = Run(
        GPT(TINY),
        lambda model, tokens: model.loss(tokens),
        lambda generator: torch.randint(99, (2, 9), generator=generator),
        cosine(1e-2, 6, 2),
        argparse.Namespace(**options),
    )
    run.train()
    return run


def test_a_resumed_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install fused-attention[examples]")
    monkeypatch.setattr(gpt, "CONFIG", TINY)
    monkeypatch.setattr(gpt, "corpus", lambda size: b"def f(x):\n    return x\n" * 400)
    out = ["--rounds", "0", "--out", str(tmp_path / "gpt")]
    once = gpt.main(["--steps", "3", "--rounds", "0"])
    gpt.main(["--steps", "2", *out])
    assert gpt.main(["--steps", "3", "--resume", *out])["losses"] == once["losses"]
    whole = tiny_run(6)
    tiny_run(3, out=tmp_path)
    torch.rand(7)  # whatever else happened meanwhile
    resumed = tiny_run(6, out=tmp_path, resume=True)
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert (tmp_path / "loss.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="with --out"):
        tiny_run(6, resume=True)


def test_being_timed_teaches_nothing():
    run = tiny_run(2)
    before = [parameter.clone() for parameter in run.model.parameters()]
    time_beside(run, GPT(TINY, layer=TorchLayer))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), before, strict=True))
    assert not run.model.training


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rate = cosine(2.0, 110, 10)
    assert [rate(5), rate(10)] == [1.0, 2.0]
    assert rate(60) == pytest.approx(1.1)
    assert [rate(110), rate(500)] == pytest.approx([0.2, 0.2])
