"""A MultiHeadAttention with options beyond torch's inside torch's own layers and stacks: what they evaluate is what they train."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, TransformerLayer, replace_modules, restore_modules

from .attention_extras import BATCH, EMBED_DIM, EXTRAS, HEADS, QUERIES, build

SELF_ATTENTION = {name: options for name, options in EXTRAS.items() if "kdim" not in options}


def sequence():
    return torch.randn(BATCH, QUERIES, EMBED_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stock_layer(options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = build(options)
    return layer


def evaluated(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(sequence())


@pytest.mark.parametrize("options", SELF_ATTENTION.values(), ids=SELF_ATTENTION)
def test_they_evaluate_what_they_train(options):
    layer = stock_layer(options)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for model in (layer, stack, pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(evaluated(model), model(sequence()))


def test_what_keeps_torchs_operators_out_is_in_no_state_dict():
    """The options given change no result here: the operators would take the weights."""
    plain, extended = build({}), build({"scale": 1.0})
    assert list(extended.state_dict()) == list(plain.state_dict())
    assert not plain._forward_pre_hooks


class Mine(MultiHeadAttention):
    """A user's attention, which no swap touches."""


def test_a_layer_around_a_users_attention_with_extras_is_not_restored():
    layer = TransformerLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = Mine(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, window=(1, 1))
    with pytest.raises(ValueError, match="self_attn is a Mine with window, which MultiheadAttention does not have"):
        restore_modules(layer)
    assert type(layer) is TransformerLayer


def test_attributes_that_users_gave_stock_modules_stay_theirs():
    """Names that ours use in other modules: a swap changes nothing but the class."""
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    decoder = nn.TransformerDecoderLayer(EMBED_DIM, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.ModuleList([layer, decoder])
    expected = layer(sequence()), decoder(sequence(), sequence())
    for module in model.modules():
        module.extras = {"mine": 1}
        module.sinks = module.q_norm = module.k_norm = module.after1 = module.after2 = "mine"
    replace_modules(model)
    assert type(layer) is TransformerLayer
    torch.testing.assert_close((layer(sequence()), decoder(sequence(), sequence())), expected)
    assert layer.extras == {"mine": 1}
    restore_modules(model)
    torch.testing.assert_close((layer(sequence()), decoder(sequence(), sequence())), expected)
