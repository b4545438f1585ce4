"""TransformerEncoder, TransformerDecoder and Transformer beside torch's: results, gradients, seeds, and their lives."""

import copy
import inspect
import pickle
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

D_MODEL, HEADS, HIDDEN, BATCH, TARGETS, SOURCES = 8, 2, 16, 3, 5, 7

CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "gelu, no bias": {"activation": "gelu", "bias": False},
    "decoder alone deep": {"num_encoder_layers": 1, "num_decoder_layers": 3, "batch_first": True},
    "odd heads": {"nhead": 1, "layer_norm_eps": 1e-3},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def build(cls, options, seed=0):
    torch.manual_seed(seed)
    defaults = {"nhead": HEADS, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": HIDDEN, "dropout": 0.0}
    return cls(D_MODEL, **{**defaults, **options}, dtype=torch.float64)


def build_pair(options):
    stock, ours = build(nn.Transformer, options), build(Transformer, options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def encoders(**options):
    """Torch's encoder and ours, of the same layers' weights."""
    stock, ours = build_pair({"batch_first": True, **options})
    return stock.encoder, ours.encoder


def inputs(model, batched=True):
    draw = torch.Generator().manual_seed(1)
    for seqlen in (SOURCES, TARGETS):
        shape = (seqlen, D_MODEL) if not batched else (BATCH, seqlen, D_MODEL) if model.batch_first else (seqlen, BATCH, D_MODEL)
        yield torch.randn(shape, generator=draw, dtype=torch.float64)


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


MASKS = {
    "none": {},
    "causal target": {"tgt_mask": floating(later(TARGETS))},
    "bool causal target": {"tgt_mask": later(TARGETS)},
    "causal both": {"src_mask": later(SOURCES), "tgt_mask": later(TARGETS), "src_is_causal": True, "tgt_is_causal": True},
    "padding": {
        "src_key_padding_mask": padding(SOURCES),
        "tgt_key_padding_mask": padding(TARGETS),
        "memory_key_padding_mask": padding(SOURCES),
    },
    "all, floating": {
        "src_mask": torch.linspace(-1, 1, SOURCES**2, dtype=torch.float64).view(SOURCES, SOURCES),
        "tgt_mask": floating(later(TARGETS)),
        "memory_mask": torch.linspace(1, -1, TARGETS * SOURCES, dtype=torch.float64).view(TARGETS, SOURCES),
        "src_key_padding_mask": floating(padding(SOURCES)),
        "tgt_key_padding_mask": floating(padding(TARGETS)),
        "memory_key_padding_mask": floating(padding(SOURCES)),
    },
    "a hint that there is none": {"tgt_mask": later(TARGETS), "tgt_is_causal": False},
}


@constructions
def test_state_dict_seed_and_generator(options):
    stock = build(nn.Transformer, options)
    after_stock = torch.get_rng_state()
    ours = build(Transformer, options)
    assert torch.equal(torch.get_rng_state(), after_stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    other = build(Transformer, options, seed=9)
    stock.load_state_dict(other.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in other.state_dict().items())


def test_every_part_is_ours():
    model = build(Transformer, {})
    assert {type(part) for part in model.modules() if "fused_attention" in type(part).__module__} == {
        Transformer,
        TransformerEncoder,
        TransformerDecoder,
        TransformerLayer,
        TransformerDecoderLayer,
        MultiHeadAttention,
    }
    assert not [part for part in model.modules() if type(part).__name__ in {"MultiheadAttention", "TransformerEncoderLayer"}]
    assert isinstance(model, nn.Transformer)
    assert isinstance(model.encoder, nn.TransformerEncoder)
    assert isinstance(model.decoder, nn.TransformerDecoder)


def test_constructors_and_forwards_take_torchs_arguments():
    for mine, theirs in (
        (Transformer, nn.Transformer),
        (TransformerEncoder, nn.TransformerEncoder),
        (TransformerDecoder, nn.TransformerDecoder),
    ):
        for name in ("__init__", "forward"):
            parameters = [inspect.signature(getattr(cls, name)).parameters.values() for cls in (mine, theirs)]
            ours = [(p.name, p.kind, p.default) for p in parameters[0] if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert ours == [(p.name, p.kind, p.default) for p in parameters[1]]


def test_custom_stacks_stay_what_they_are():
    class Stack(nn.Module):
        def forward(self, *inputs, **masks):
            return inputs[0]

    encoder, decoder = Stack(), nn.TransformerDecoder(nn.TransformerDecoderLayer(D_MODEL, HEADS), 1)
    model = Transformer(D_MODEL, HEADS, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    assert type(model.decoder) is nn.TransformerDecoder
    assert type(model.decoder.layers[0]) is nn.TransformerDecoderLayer


@constructions
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_results_and_gradients_equal_torchs(options, masks):
    results = []
    for model in build_pair(options):
        tensors = [tensor.requires_grad_() for tensor in inputs(model)]
        out = model(*tensors, **masks)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weights).sum(), [*tensors, *model.parameters()])))
    torch.testing.assert_close(results[1], results[0])


@constructions
def test_unbatched_input_equals_torchs(options):
    stock, ours = build_pair(options)
    call = {"tgt_mask": later(TARGETS), "src_key_padding_mask": torch.tensor([False] * 4 + [True] * (SOURCES - 4))}
    torch.testing.assert_close(ours(*inputs(ours, batched=False), **call), stock(*inputs(stock, batched=False), **call))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_equals_torchs_where_nothing_is_padded(mode, norm_first):
    stock, ours = (encoder.eval() for encoder in encoders(norm_first=norm_first))
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        for call in ({}, {"mask": later(SOURCES)}, {"src_key_padding_mask": padding(SOURCES)}):
            expected, got = stock(source(), **call), ours(source(), **call)
            valid = ~call.get("src_key_padding_mask", torch.zeros(BATCH, SOURCES, dtype=torch.bool))
            torch.testing.assert_close(got[valid], expected[valid])


def test_attributes_and_warnings_of_the_encoder_are_torchs():
    for options in ({"norm_first": True}, {"bias": False, "batch_first": True}, {"batch_first": True}):
        recorded = []
        for cls in (nn.TransformerEncoder, TransformerEncoder):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                stack = cls(nn.TransformerEncoderLayer(D_MODEL, HEADS, **options), 2, mask_check=False)
            state = (stack.num_layers, stack.norm, stack.enable_nested_tensor, stack.use_nested_tensor, stack.mask_check)
            recorded.append((state, [str(warning.message) for warning in caught]))
        assert recorded[1] == recorded[0]


def test_a_nested_batch_stays_nested_and_equals_its_members():
    stock, ours = encoders()
    members = [source()[0], source()[1, :3]]
    with torch.no_grad():
        out = ours.eval()(torch.nested.nested_tensor(members))
        for got, member in zip(out.unbind(), members, strict=True):
            torch.testing.assert_close(got, stock.train()(member[None])[0])


def test_pickle_deepcopy_meta_and_repr():
    stock, ours = build_pair({})
    src, tgt = inputs(ours)
    expected = ours(src, tgt)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin.encoder) is TransformerEncoder
        torch.testing.assert_close(twin(src, tgt), expected, rtol=0, atol=0)
    names = repr(ours).replace("TransformerLayer", "TransformerEncoderLayer").replace("MultiHeadAttention", "MultiheadAttention")
    assert names == repr(stock)
    on_meta = Transformer(D_MODEL, HEADS, 1, 1, device="meta")
    out = on_meta(src.float().to("meta"), tgt.float().to("meta"), tgt_mask=later(TARGETS).to("meta"))
    assert out.is_meta
    assert out.shape == tgt.shape


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning")
def test_dynamic_quantisation_keeps_our_modules():
    model = Transformer(D_MODEL, HEADS, 1, 1, HIDDEN, dropout=0.0, batch_first=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantised.decoder.layers[0]) is TransformerDecoderLayer
    assert type(quantised.decoder.layers[0].linear1) is not nn.Linear
    src, tgt = (tensor.float() for tensor in inputs(model))
    with torch.no_grad():
        assert quantised(src, tgt).shape == tgt.shape


def test_a_training_run_equals_torchs():
    """Ten Adam steps of both models from the same weights on the same batch."""
    losses = []
    for model in build_pair({"batch_first": True}):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        run, src = [], source()
        for _ in range(10):
            out = model(src, src[:, :TARGETS], tgt_mask=later(TARGETS), src_key_padding_mask=padding(SOURCES))
            loss = (out - src[:, 1 : TARGETS + 1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[1][0] > losses[1][-1]
    # Adam divides by the gradient's size, so that rounding grows step by step: a part in a million, of a loss of order one.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
