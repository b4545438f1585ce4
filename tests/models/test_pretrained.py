"""Weights of the transformers library: its models and ours, on random weights, say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attention.models import from_transformers, generate, log_mel

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install fused-attention[transformers]")
pytestmark = pytest.mark.filterwarnings("ignore")  # what that library warns of is its own
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "encoder.embed_positions" not in name:  # Whisper's sinusoids
            nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def gpt2(**options: Any) -> Any:
    config = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 1}
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | options)))


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@torch.no_grad()
def test_gpt2(activation):
    theirs = gpt2(activation_function=activation)
    ours = from_transformers(theirs)
    same(ours(TOKENS), theirs(TOKENS).logits)
    assert from_transformers(gpt2(n_inner=4 * 32)).config == from_transformers(gpt2()).config
    written = theirs.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=None)
    assert torch.equal(generate(ours, TOKENS, 6), written[:, 9:])


@torch.no_grad()
def test_bert():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50, "intermediate_size": 64}
    theirs = randomised(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, 6:] = 0
    kinds = TOKENS % 2
    expected = theirs(TOKENS, attention_mask=real, token_type_ids=kinds).logits
    same(from_transformers(theirs)(TOKENS, real == 0, kinds)[real == 1], expected[real == 1])


@torch.no_grad()
def test_vit():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 8, "patch_size": 2}
    theirs = randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=10)))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    same(from_transformers(theirs)(images), theirs(images).logits)


@torch.no_grad()
def test_whisper():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 30, "max_target_positions": 20, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    theirs = randomised(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **tokens)))
    mels = torch.randn(2, 80, 60, dtype=torch.float64)
    same(from_transformers(theirs)(mels, TOKENS), theirs(mels, decoder_input_ids=TOKENS).logits)
    theirs.model.encoder.embed_positions.weight.data.normal_()  # as if they had been trained
    same(from_transformers(theirs)(mels, TOKENS), theirs(mels, decoder_input_ids=TOKENS).logits)
    other = transformers.WhisperConfig(**sizes | {"decoder_attention_heads": 4}, **tokens)
    with pytest.raises(NotImplementedError, match="encoder_attention_heads is 2, decoder_attention_heads 4"):
        from_transformers(transformers.WhisperForConditionalGeneration(other))


def test_log_mel_is_whispers():
    audio = 0.1 * torch.randn(16000 * 30, generator=torch.Generator().manual_seed(2))
    heard = transformers.WhisperFeatureExtractor()(audio.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
    torch.testing.assert_close(log_mel(audio), heard, rtol=1e-4, atol=1e-4)


def test_what_ours_have_not_is_said():
    with pytest.raises(NotImplementedError, match="model is a Linear, expected one of GPT2LMHeadModel"):
        from_transformers(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="activation_function is 'relu' in the model's config, expected 'gelu_new'"):
        from_transformers(gpt2(activation_function="relu"))
    with pytest.raises(NotImplementedError, match="n_inner is 64 in the model's config, expected None or 128"):
        from_transformers(gpt2(n_inner=64))
    with pytest.raises(NotImplementedError, match="scale_attn_by_inverse_layer_idx is True"):
        from_transformers(gpt2(scale_attn_by_inverse_layer_idx=True))
