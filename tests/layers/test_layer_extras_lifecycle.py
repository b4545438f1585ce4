"""The life of a layer with options beyond torch's: copies, compilers and transforms, its page in the docs, and what it refuses."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Rotary, Transformer, TransformerDecoderLayer, TransformerLayer

from .layer_extras import (
    ARRANGEMENTS,
    BATCH,
    D_MODEL,
    DECODERS,
    HEADS,
    HIDDEN,
    LLAMA,
    MEMORY,
    build,
    sequence,
)


@pytest.mark.parametrize("cls", [TransformerLayer, TransformerDecoderLayer])
def test_without_extras_nothing_is_drawn_or_added(cls):
    parent = cls.__mro__[1]
    for options in ({}, {"norm": "layer", "sandwich": False, "ff_bias": None, "rotary": None, "sinks": False}):
        torch.manual_seed(0)
        ours = cls(D_MODEL, HEADS, **options)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        stock = parent(D_MODEL, HEADS)
        assert torch.equal(torch.get_rng_state(), state)
        assert vars(ours).keys() == vars(stock).keys()
        torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
        assert ours._fused_extras is None
        assert ours.self_attn._fused_extras is None


@pytest.mark.parametrize(
    ("cls", "options", "dtype"),
    [(TransformerLayer, LLAMA, torch.float32), (TransformerDecoderLayer, DECODERS["sandwich"], torch.float64)],
)
def test_compiled_in_one_graph_it_is_the_same(cls, options, dtype):
    torch._dynamo.reset()
    layer = build(options, cls, dtype)
    inputs = [x.to(dtype) for x in (sequence(), sequence(MEMORY))][: 1 + (cls is TransformerDecoderLayer)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [function(*inputs) for function in (layer, compiled)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [torch.autograd.grad(out.square().sum(), layer.parameters()) for out in results]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("cls", "options"),
    [(TransformerLayer, options) for options in (LLAMA, *ARRANGEMENTS.values())] + [(TransformerDecoderLayer, DECODERS["sandwich"])],
)
def test_its_state_travels(cls, options):
    layer, other = build(options, cls), build(options, cls, seed=1)
    inputs = [sequence(), sequence(MEMORY)][: 1 + (cls is TransformerDecoderLayer)]
    expected = layer(*inputs)
    other.load_state_dict(layer.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(*inputs), expected, rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in cls(D_MODEL, HEADS, HIDDEN, device="meta", **options).parameters())


EVERYTHING = {**LLAMA, "qk_norm": "rms", "sinks": True, "alibi": True, "window": (5, None), "softcap": 3.0, "sandwich": True}


def test_functional_transforms():
    """Gradients by member as torch.func takes them, the derivative along a direction, and second derivatives."""
    layer, x = build(EVERYTHING), sequence()
    parameters = dict(layer.named_parameters())

    def loss(parameters, member):
        return torch.func.functional_call(layer, parameters, (member[None],), {"is_causal": True}).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for member in range(BATCH):
        expected = torch.autograd.grad(loss(parameters, x[member]), parameters.values())
        torch.testing.assert_close([gradient[member] for gradient in each.values()], list(expected))
    direction = sequence(seed=2)
    _, slope = torch.func.jvp(lambda y: loss(parameters, y), (x[0],), (direction[0],))
    gradient = torch.func.grad(loss, argnums=1)(parameters, x[0])
    torch.testing.assert_close(slope, (gradient * direction[0]).sum())
    small = x[:1, :3].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: layer(y, is_causal=True), small)


def test_export_with_sequences_of_any_length():
    layer = build(EVERYTHING)
    lengths = {"src": {1: torch.export.Dim("seqlen", min=2, max=64)}, "is_causal": None}
    program = torch.export.export(layer, (sequence(),), {"is_causal": True}, dynamic_shapes=lengths)
    for seqlen in (3, 20):
        torch.testing.assert_close(program.module()(sequence(seqlen), is_causal=True), layer(sequence(seqlen), is_causal=True))


def test_the_page_names_every_option_and_its_example_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "blocks.md").read_text()
    for cls in (MultiHeadAttention, TransformerLayer, TransformerDecoderLayer, Transformer):
        for option in inspect.signature(cls).parameters.values():
            assert option.kind is not option.KEYWORD_ONLY or f"`{option.name}" in page, option.name
    for example in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(example, {})  # the page's own text, in this repository


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", [*ARRANGEMENTS.values(), {"num_kv_heads": 2}])
def test_torchscript_refuses_in_a_sentence(options):
    with pytest.raises(
        NotImplementedError, match=r"torch\.jit\.script cannot compile a (Transformer|MultiHeadAttention).* with .*: use torch"
    ):
        torch.jit.script(nn.Sequential(build(options)))


WRONG_OPTIONS = {
    "norm": (ValueError, 'norm is \'batch\', expected "layer" or "rms"', {"norm": "batch"}),
    "sandwich": (TypeError, "sandwich is 1, expected True or False", {"sandwich": 1, "norm_first": True}),
    "sandwich of post-norm": (ValueError, "sandwich=True needs norm_first=True", {"sandwich": True}),
    "parallel": (ValueError, 'parallel is True, expected "one_norm" or "two_norms"', {"parallel": True, "norm_first": True}),
    "parallel of post-norm": (ValueError, "parallel='one_norm' needs norm_first=True", {"parallel": "one_norm"}),
    "bias of the feed-forward block": (TypeError, "ff_bias is 'no', expected True or False, or None", {"ff_bias": "no"}),
    "bias of a norm without": (ValueError, 'norm_bias is True, and norm "rms" has no bias', {"norm": "rms", "norm_bias": True}),
    "activation": (RuntimeError, "activation should be relu/gelu, not reglu", {"activation": "reglu"}),
    "attention's": (ValueError, "num_kv_heads is 3, num_heads 4", {"num_kv_heads": 3}),
    "unknown": (
        TypeError,
        "TransformerLayer.__init__() got an unexpected keyword argument 'rotry': expected one",
        {"rotry": Rotary()},
    ),
}


@pytest.mark.parametrize(("error", "sentence", "options"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options_say_what_is_wrong(error, sentence, options):
    with pytest.raises(error, match=re.escape(sentence)):
        TransformerLayer(D_MODEL, HEADS, **options)


def test_the_decoder_layer_is_never_parallel():
    generator = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"^TransformerDecoderLayer\.__init__\(\) got an unexpected keyword argument 'parallel'"):
        TransformerDecoderLayer(D_MODEL, HEADS, parallel="one_norm", norm_first=True)
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_attention_is_ours_and_says_what_it_has():
    layer = build(LLAMA)
    assert type(layer.self_attn) is MultiHeadAttention
    assert "num_kv_heads=2, rotary=Rotary(base=500.0" in repr(layer)
    assert layer._fused_extras.given() == {"norm": "rms", "activation": "swiglu"}
