"""What the stacks hand their layers: torch's keywords and masks to layers of any kind, less than that to ours, which need no more."""

import warnings

import pytest
import torch
from torch import nn

from fused_attention import (
    MultiHeadAttention,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerLayer,
)

D_MODEL, HEADS, HIDDEN, BATCH, SOURCES = 8, 2, 16, 3, 7

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


def build_pair():
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    return tuple(cls(D_MODEL, HEADS, 2, 2, HIDDEN, **options) for cls in (nn.Transformer, Transformer))


def source():
    return torch.randn(BATCH, SOURCES, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def later(seqlen):
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


def padding(seqlen):
    hidden = torch.zeros(BATCH, seqlen, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


def floating(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


class Recorder(nn.TransformerEncoderLayer):
    """A foreign layer that notes its keywords, as torch's own test does with a mock."""

    def forward(self, src, **call):
        self.calls.append(call)
        return src


class DecoderRecorder(nn.TransformerDecoderLayer):
    def forward(self, tgt, memory, **call):
        self.calls.append(call)
        return tgt


@pytest.mark.parametrize("mask", ["bool", "float", "not causal", "3-D", None])
@pytest.mark.parametrize("hint", [None, True, False])
def test_foreign_layers_see_torchs_keywords_and_form_of_the_masks(mask, hint):
    masks = {
        "bool": later(SOURCES),
        "float": floating(later(SOURCES)),
        "not causal": later(SOURCES).flip(0),
        "3-D": later(SOURCES).expand(BATCH * HEADS, -1, -1),
        None: None,
    }
    recorded, decoded = [], []
    for encoder, decoder in ((nn.TransformerEncoder, nn.TransformerDecoder), (TransformerEncoder, TransformerDecoder)):
        layer, decoder_layer = Recorder(D_MODEL, HEADS, batch_first=True), DecoderRecorder(D_MODEL, HEADS, batch_first=True)
        layer.calls, decoder_layer.calls = [], []
        stacks = encoder(layer, 1, enable_nested_tensor=False), decoder(decoder_layer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecation of masks of two dtypes, which torch's stack gives too
            stacks[0](source().float(), mask=masks[mask], src_key_padding_mask=padding(SOURCES), is_causal=hint)
        stacks[1](source(), source(), tgt_mask=masks[mask], tgt_key_padding_mask=padding(SOURCES), tgt_is_causal=hint)
        recorded += stacks[0].layers[0].calls
        decoded += stacks[1].layers[0].calls
    for calls in (recorded, decoded):
        assert list(calls[0]) == list(calls[1])
        torch.testing.assert_close(calls[1], calls[0], rtol=0, atol=0)


def test_bool_masks_reach_the_attention_as_bool():
    ours = build_pair()[1].encoder
    seen = []
    ours.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["attn_mask"].dtype, kwargs["key_padding_mask"].dtype)), with_kwargs=True
    )
    hidden = later(SOURCES)
    hidden[5, 2] = True
    ours(source(), mask=hidden, src_key_padding_mask=padding(SOURCES))
    assert seen == [(torch.bool, torch.bool)]


def masks_seen(model, *tensors, **masks):
    """The attn_mask and hint of each self-attention."""
    seen = []
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["attn_mask"], kwargs["is_causal"])), with_kwargs=True
        )
    model(*tensors, **masks)
    return seen


@pytest.mark.parametrize("mask", [later(SOURCES), floating(later(SOURCES))])
def test_a_causal_mask_becomes_the_hint(mask):
    """The attention then skips what the mask would hide."""
    stock, ours = build_pair()
    assert masks_seen(ours.encoder, source(), mask=mask) == [(None, True)] * 2
    assert masks_seen(ours.decoder, source(), source(), tgt_mask=mask) == [(None, True)] * 2
    assert masks_seen(stock.encoder, source(), mask=mask)[0][0] is not None


class Overriding(TransformerLayer):
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


class Forwarding(TransformerLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


class ForwardingAttention(MultiHeadAttention):
    def forward(self, *operands, **call):
        return super().forward(*operands, **call)


REASONS = [
    "needs a gradient",
    "hint given",
    "overridden",
    "overridden by a class",
    "another forward",
    "another forward of the instance",
    "a hook in front that sees the mask",
    "a hook behind that sees the mask",
    "another attention",
    "an attention of another forward",
    "an attention of another forward of the instance",
    "not causal",
]


@pytest.mark.parametrize("why", REASONS)
def test_a_mask_that_may_matter_stays(why):
    _, ours = build_pair()
    mask, call = floating(later(SOURCES)), {}
    if why == "needs a gradient":
        mask.requires_grad_()
    elif why == "hint given":
        call = {"is_causal": True}
    elif why == "overridden":
        layer = ours.encoder.layers[1]
        layer._sa_block = lambda *arguments, **options: TransformerLayer._sa_block(layer, *arguments, **options)
    elif why == "overridden by a class":
        ours.encoder.layers[1].__class__ = Overriding
    elif why == "another forward":
        ours.encoder.layers[1].__class__ = Forwarding
    elif why == "another forward of the instance":
        layer = ours.encoder.layers[1]
        layer.forward = lambda *arguments, **options: TransformerLayer.forward(layer, *arguments, **options)
    elif why == "a hook in front that sees the mask":
        ours.encoder.layers[1].register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"src_mask": kwargs["src_mask"].clone()}), with_kwargs=True
        )
    elif why == "a hook behind that sees the mask":
        ours.encoder.layers[1].register_forward_hook(lambda _, args, kwargs, out: out + 0 * kwargs["src_mask"].sum(), with_kwargs=True)
    elif why == "an attention of another forward":
        ours.encoder.layers[1].self_attn.__class__ = ForwardingAttention
    elif why == "an attention of another forward of the instance":
        attention = ours.encoder.layers[1].self_attn
        attention.forward = lambda *operands, **options: MultiHeadAttention.forward(attention, *operands, **options)
    elif why == "another attention":
        ours.encoder.layers[1].self_attn.__class__ = nn.MultiheadAttention
    else:
        mask[0, 3] = 0.0
    assert all(seen is not None for seen, _ in masks_seen(ours.encoder, source(), mask=mask, **call))


@pytest.mark.parametrize("kind", ["layer", "attention", "class of the attention"])
def test_a_forward_of_ones_own_gets_torchs_form_of_the_mask(kind):
    seen = []
    for stack in build_pair():
        layer = stack.encoder.layers[0]
        if kind == "layer":
            layer.forward = lambda src, src_mask, is_causal, src_key_padding_mask: seen.append((src_mask, src_key_padding_mask)) or src
        else:
            attention = layer.self_attn

            def forward(self, query, key, value, attn_mask, key_padding_mask, **call):
                seen.append((attn_mask, key_padding_mask))
                return query, None

            if kind == "attention":
                attention.forward = lambda *operands, **call: forward(None, *operands, **call)
            else:
                attention.__class__ = type("Mine", (type(attention),), {"forward": forward})
        stack.encoder(source(), mask=later(SOURCES), src_key_padding_mask=padding(SOURCES))
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


def test_layers_of_every_kind_stand_in_our_stack():
    class Custom(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * 0.5

    torch.manual_seed(0)
    for kind in (nn.TransformerEncoderLayer, TransformerLayer, Custom):
        layer = kind(D_MODEL, HEADS, HIDDEN, dropout=0.0, batch_first=True, dtype=torch.float64)
        stock, ours = nn.TransformerEncoder(layer, 2), TransformerEncoder(layer, 2)
        for mask in (later(SOURCES), floating(later(SOURCES))):
            torch.testing.assert_close(ours(source(), mask=mask), stock(source(), mask=mask))
        decoder = {TransformerLayer: TransformerDecoderLayer}.get(kind, nn.TransformerDecoderLayer)
        decoder_layer = decoder(D_MODEL, HEADS, HIDDEN, dropout=0.0, batch_first=True, dtype=torch.float64)
        stacks = nn.TransformerDecoder(decoder_layer, 2), TransformerDecoder(decoder_layer, 2)
        expected, got = (stack(source(), source(), tgt_mask=later(SOURCES)) for stack in stacks)
        torch.testing.assert_close(got, expected)
