"""The encoder-decoder Transformer with layers beyond torch's: the stacks that one would build of such layers, and what it refuses."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from fused_attention import Transformer, TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerLayer, restore_modules

from .layer_extras import BATCH, D_MODEL, DECODERS, HEADS, HIDDEN, MEMORY, SEQLEN, decoders, sequence


def build(options):
    torch.manual_seed(0)
    model = Transformer(D_MODEL, HEADS, 2, 1, HIDDEN, **{"dropout": 0.0, "batch_first": True, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@decoders
def test_it_is_the_stacks_of_such_layers(options):
    model = build(options)
    layer = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    last = nn.RMSNorm if options.get("norm") == "rms" else nn.LayerNorm
    assert isinstance(model.encoder.norm, last)
    assert isinstance(model.decoder.norm, last)
    assert model.encoder.norm.eps == model.encoder.layers[0].norm1.eps
    encoder = TransformerEncoder(TransformerLayer(D_MODEL, HEADS, HIDDEN, **layer), 2, copy.deepcopy(model.encoder.norm), False)
    decoder = TransformerDecoder(TransformerDecoderLayer(D_MODEL, HEADS, HIDDEN, **layer), 1, copy.deepcopy(model.decoder.norm))
    encoder.load_state_dict(model.encoder.state_dict(), strict=True)
    decoder.load_state_dict(model.decoder.state_dict(), strict=True)
    src, tgt = sequence(MEMORY), sequence(SEQLEN, seed=2)
    padding = torch.arange(MEMORY).ge(3).expand(BATCH, -1)
    memory = encoder(src, src_key_padding_mask=padding)
    expected = decoder(tgt, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
    out = model(src, tgt, tgt_is_causal=True, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_stack_may_be_of_ones_own():
    own = nn.TransformerEncoder(nn.TransformerEncoderLayer(D_MODEL, HEADS, HIDDEN, batch_first=True), 1, enable_nested_tensor=False)
    model = Transformer(D_MODEL, HEADS, 1, 1, HIDDEN, custom_encoder=own, batch_first=True, sinks=True)
    assert model.encoder is own
    assert model.decoder.layers[0].multihead_attn._fused_extras.sinks


def test_its_state_travels_and_it_stays_ours():
    model = build(DECODERS["llama with a memory"])
    inputs = sequence(MEMORY), sequence(SEQLEN, seed=2)
    expected = model(*inputs)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(twin(*inputs), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"encoder.* is a Transformer\w*Layer with .*call restore_modules on the other parts"):
        restore_modules(model)


def test_weights_start_as_torchs_do():
    """Matrices of the whole model drawn by Xavier's rule, vectors as their modules leave them."""
    torch.manual_seed(0)
    model = Transformer(D_MODEL, HEADS, 1, 1, HIDDEN, sinks=True, norm="rms")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "sinks" in name:
            assert not parameter.any()


WRONG = {
    "no layers to build": (
        ValueError,
        "norm, sinks would change layers, and custom_encoder and custom_decoder leave none to build",
        {"custom_encoder": nn.Identity(), "custom_decoder": nn.Identity(), "norm": "rms", "sinks": True},
    ),
    "side by side": (TypeError, "Transformer.__init__() got an unexpected keyword argument 'parallel'", {"parallel": "one_norm"}),
    "sandwich": (ValueError, "sandwich=True needs norm_first=True", {"sandwich": True}),
}


@pytest.mark.parametrize(("error", "sentence", "options"), WRONG.values(), ids=WRONG)
def test_wrong_options_say_what_is_wrong(error, sentence, options):
    with pytest.raises(error, match=re.escape(sentence)):
        Transformer(D_MODEL, HEADS, 1, 1, HIDDEN, **options)
