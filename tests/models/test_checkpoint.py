"""Models in files: what is loaded says what was saved, and what is no model of ours is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fused_attention import TransformerLayer
from fused_attention.models import GPT, GPTConfig, Transformer, TransformerConfig, ViT, ViTConfig, Whisper, WhisperConfig, load, save
from fused_attention.models.checkpoint import MODELS

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install fused-attention[examples]")

SIZES = {"width": 16, "heads": 2, "layers": 1}


def whisper_that_learned_its_sinusoids() -> Whisper:
    config = WhisperConfig(11, mels=4, audio_context=3, text_context=9, width=16, heads=2, encoder_layers=1, decoder_layers=1)
    model = Whisper(config)
    model.sinusoids.normal_()
    return model


def test_a_loaded_model_says_what_was_saved(tmp_path):
    tokens = torch.randint(11, (2, 5))
    for model, inputs in (
        (GPT(GPTConfig(11, context=9, **SIZES, tanh_gelu=True)), (tokens,)),
        (Transformer(TransformerConfig(11, **SIZES, feed_forward=32)).bfloat16(), (tokens, tokens)),
        (ViT(ViTConfig(4, image=4, patch=2, channels=1, **SIZES)), (torch.randn(2, 1, 4, 4),)),
        (whisper_that_learned_its_sinusoids(), (torch.randn(2, 4, 6), tokens)),
    ):
        path = tmp_path / "model.safetensors"
        save(model.eval(), path)
        loaded = load(path)
        assert type(loaded) is type(model)
        assert loaded.config == model.config
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_every_model_can_be_saved():
    import fused_attention.models as models

    ours = {name for name in models.__all__ if isinstance(each := getattr(models, name), type) and issubclass(each, nn.Module)}
    assert ours == set(MODELS)


def test_each_weight_keeps_its_dtype(tmp_path):
    model = ViT(ViTConfig(4, image=4, patch=2, channels=1, **SIZES)).half()
    model.norm.float()
    save(model, tmp_path / "x.safetensors")
    assert {name: weight.dtype for name, weight in load(tmp_path / "x.safetensors").state_dict().items()} == {
        name: weight.dtype for name, weight in model.state_dict().items()
    }


def relu(width, heads, feed_forward, dropout, activation, **options):
    return TransformerLayer(width, heads, feed_forward, dropout, "relu", **options)


def four_heads(width, heads, *others, **options):
    return TransformerLayer(width, 4, *others, **options)


@pytest.mark.parametrize("layer", [partial(TransformerLayer, window=(1, 0)), relu, four_heads], ids=["window", "relu", "heads"])
def test_layers_that_a_config_does_not_make_are_refused(tmp_path, layer):
    """What has no weights of its own was lost in silence."""
    model = GPT(GPTConfig(11, context=9, **SIZES), layer=layer)
    with pytest.raises(TypeError, match="of other layers than its config makes"):
        save(model, tmp_path / "x.safetensors")


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model is a Linear, expected one of BERT"):
        save(nn.Linear(2, 2), tmp_path / "x.safetensors")
    safetensors.save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected a model of BERT"):
        load(tmp_path / "x.safetensors")
