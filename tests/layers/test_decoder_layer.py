"""TransformerDecoderLayer beside torch's decoder layer: state dict, initial weights, results and gradients under every mask, overrides."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attention import MultiHeadAttention, TransformerDecoderLayer

D_MODEL, HEADS, HIDDEN, BATCH, TARGETS, SOURCES = 8, 2, 16, 3, 5, 7

CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"norm_first": True, "batch_first": True},
    "gelu by name": {"activation": "gelu"},
    "another activation": {"activation": F.silu, "layer_norm_eps": 1e-3},
    "no bias": {"bias": False, "batch_first": True},
    "odd heads": {"nhead": 1, "norm_first": True},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)


def build(cls, options, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return cls(D_MODEL, **{"nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, **options}, dtype=dtype)


def build_pair(options):
    stock, ours = build(nn.TransformerDecoderLayer, options), build(TransformerDecoderLayer, options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(layer, batched=True):
    draw = torch.Generator().manual_seed(1)

    def shape(seqlen):
        if not batched:
            return (seqlen, D_MODEL)
        return (BATCH, seqlen, D_MODEL) if layer.self_attn.batch_first else (seqlen, BATCH, D_MODEL)

    return tuple(torch.randn(shape(seqlen), generator=draw, dtype=torch.float64) for seqlen in (TARGETS, SOURCES))


def later(seqlen_k=TARGETS):
    return torch.ones(TARGETS, seqlen_k, dtype=torch.bool).triu(1)


def padding(seqlen):
    hidden = torch.zeros(BATCH, seqlen, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


def floating(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, float("-inf"))


def some(heads, seqlen_k, dims):
    hidden = torch.rand(
        (TARGETS, seqlen_k) if dims == 2 else (BATCH * heads, TARGETS, seqlen_k), generator=torch.Generator().manual_seed(2)
    )
    hidden = hidden < 0.3
    hidden[..., 0] = False
    return hidden


# Of the targets among themselves, and between targets and memory; every pair of them is tried.
TARGET_MASKS = {
    "none": lambda heads: {},
    "bool": lambda heads: {"tgt_mask": later()},
    "float and padding": lambda heads: {"tgt_mask": floating(later()), "tgt_key_padding_mask": floating(padding(TARGETS))},
    "3-D and padding": lambda heads: {"tgt_mask": some(heads, TARGETS, 3), "tgt_key_padding_mask": padding(TARGETS)},
    "causal by mask and hint": lambda heads: {"tgt_mask": later(), "tgt_is_causal": True},
}
MEMORY_MASKS = {
    "none": lambda heads: {},
    "padding": lambda heads: {"memory_key_padding_mask": padding(SOURCES)},
    "bool": lambda heads: {"memory_mask": some(heads, SOURCES, 2)},
    "float 3-D": lambda heads: {"memory_mask": floating(some(heads, SOURCES, 3)), "memory_key_padding_mask": floating(padding(SOURCES))},
    "causal by mask and hint": lambda heads: {"memory_mask": later(SOURCES), "memory_is_causal": True},
}
MASKS = {f"{ours}, {theirs}": (ours, theirs) for ours, theirs in itertools.product(TARGET_MASKS, MEMORY_MASKS)}


@constructions
def test_state_dict_seed_and_generator(options):
    stock = build(nn.TransformerDecoderLayer, options)
    after_stock = torch.get_rng_state()
    ours = build(TransformerDecoderLayer, options)
    assert torch.equal(torch.get_rng_state(), after_stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in stock.state_dict().items())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    other = build(TransformerDecoderLayer, options, seed=9)
    stock.load_state_dict(other.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in other.state_dict().items())


def test_constructor_and_forward_take_torchs_arguments():
    stock = nn.TransformerDecoderLayer
    for name in ("__init__", "forward", "_sa_block", "_mha_block", "_ff_block"):
        mine, theirs = (inspect.signature(getattr(cls, name)).parameters.values() for cls in (TransformerDecoderLayer, stock))
        extras = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [(p.name, p.kind, p.default) for p in extras] == [(p.name, p.kind, p.default) for p in theirs]
    layer = build(TransformerDecoderLayer, {})
    assert isinstance(layer, stock)
    assert type(layer.self_attn) is type(layer.multihead_attn) is MultiHeadAttention


@constructions
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_results_and_gradients_equal_torchs(options, masks):
    stock, ours = build_pair(options)
    heads = ours.self_attn.num_heads
    call = TARGET_MASKS[masks[0]](heads) | MEMORY_MASKS[masks[1]](heads)
    results = []
    for layer in (stock, ours):
        tensors = [tensor.requires_grad_() for tensor in inputs(layer)]
        out = layer(*tensors, **call)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weights).sum(), [*tensors, *layer.parameters()])))
    torch.testing.assert_close(results[1], results[0])


@constructions
def test_unbatched_input_equals_torchs(options):
    stock, ours = build_pair(options)
    call = {"tgt_mask": later(), "memory_key_padding_mask": torch.tensor([False] * 4 + [True] * (SOURCES - 4))}
    torch.testing.assert_close(ours(*inputs(ours, batched=False), **call), stock(*inputs(stock, batched=False), **call))


@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_equals_training_and_torchs(norm_first):
    stock, ours = build_pair({"batch_first": True, "norm_first": norm_first})
    call = {"tgt_mask": later(), "memory_key_padding_mask": padding(SOURCES)}
    expected = stock.train()(*inputs(stock), **call)
    for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with guard():
            torch.testing.assert_close(ours.eval()(*inputs(ours), **call), expected)


def test_masks_of_two_dtypes_warn_as_torchs_do():
    recorded = []
    for layer in build_pair({"batch_first": True}):
        with pytest.warns(UserWarning, match="mismatched") as caught:
            layer(*inputs(layer), tgt_mask=floating(later()), tgt_key_padding_mask=padding(TARGETS))
        recorded.append([str(warning.message) for warning in caught])
    assert recorded[0] == recorded[1]


def test_overridden_blocks_run_with_the_masks_as_given():
    calls = []

    def override(base):
        class Layer(base):
            def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
                calls.append(("self", attn_mask.dtype, key_padding_mask.dtype, is_causal))
                return super()._sa_block(x, attn_mask, key_padding_mask, is_causal) * 0.5

            def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
                calls.append(("memory", attn_mask, key_padding_mask.dtype, is_causal))
                return super()._mha_block(x, mem, attn_mask, key_padding_mask, is_causal) * 0.25

            def _ff_block(self, x):
                calls.append(("feed forward", None, None, None))
                return super()._ff_block(x) * 2

        return build(Layer, {"batch_first": True})

    call = {"tgt_mask": later(), "tgt_key_padding_mask": padding(TARGETS), "memory_key_padding_mask": padding(SOURCES)}
    stock = override(nn.TransformerDecoderLayer)
    expected = stock(*inputs(stock), **call)
    as_torch_calls, calls = calls, []
    ours = override(TransformerDecoderLayer)
    for training in (True, False):
        calls.clear()
        torch.testing.assert_close(ours.train(training)(*inputs(ours), **call), expected)
        assert calls == as_torch_calls


def test_hooks_on_every_child_fire_once():
    _, ours = build_pair({"batch_first": True})
    fired = []
    for name, child in ours.named_modules():
        child.register_forward_hook(lambda *_, name=name: fired.append(name))
    with torch.no_grad():
        ours.eval()(*inputs(ours))
    assert sorted(fired) == sorted(name for name, _ in ours.named_modules())


def test_dropout_is_active_in_training_alone():
    ours = build(TransformerDecoderLayer, {"dropout": 0.5, "batch_first": True})
    tensors = inputs(ours)
    torch.manual_seed(0)
    first, second = ours(*tensors), ours(*tensors)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ours(*tensors), first)
    ours.eval()
    assert torch.equal(ours(*tensors), ours(*tensors))


def test_pickle_deepcopy_meta_and_repr():
    stock, ours = build_pair({"activation": "gelu"})
    tensors = inputs(ours)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin.multihead_attn) is MultiHeadAttention
        torch.testing.assert_close(twin(*tensors), ours(*tensors), rtol=0, atol=0)
    assert repr(ours).replace("MultiHeadAttention", "MultiheadAttention") == repr(stock)
    on_meta = TransformerDecoderLayer(D_MODEL, HEADS, device="meta")
    out = on_meta(*(tensor.float().to("meta") for tensor in tensors))
    assert out.is_meta
    assert out.shape == tensors[0].shape


def test_a_checkpoint_without_an_activation_is_read_as_torchs_is():
    _, ours = build_pair({})
    state = ours.__dict__.copy()
    del state["activation"]
    loaded = TransformerDecoderLayer.__new__(TransformerDecoderLayer)
    loaded.__setstate__(state)
    torch.testing.assert_close(loaded(*inputs(ours)), ours(*inputs(ours)), rtol=0, atol=0)


def test_the_layer_reads_its_parts_at_every_call():
    stock, ours = build_pair({"batch_first": True})
    tensors = inputs(ours)
    ours(*tensors)
    for layer in (stock, ours):
        layer.norm_first = True
        layer.activation = F.gelu
        layer.linear2.weight.data.mul_(2)
        layer.multihead_attn.in_proj_weight = nn.Parameter(layer.multihead_attn.in_proj_weight.detach() * 2)
    torch.testing.assert_close(ours(*tensors), stock(*tensors))


@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_torchs_decoder_takes_our_layer(mode):
    stock, ours = build_pair({"batch_first": True})
    decoders = [nn.TransformerDecoder(layer, 2, nn.LayerNorm(D_MODEL, dtype=torch.float64)) for layer in (stock, ours)]
    call = {"tgt_mask": floating(later()), "memory_key_padding_mask": padding(SOURCES)}
    with torch.set_grad_enabled(mode != "no_grad"):
        expected, got = (decoder.train(mode == "train")(*inputs(ours), **call) for decoder in decoders)
    torch.testing.assert_close(got, expected)
