"""The modules under TorchScript, torch.compile and torch.export: the numbers of eager, and a live model left as it was."""

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
    replace_modules,
)

EMBED_DIM, HEADS, BATCH, SEQLEN = 12, 3, 2, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants:UserWarning"),  # of torch's stacks too
]

CONSTRUCTIONS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "kdim and vdim": {"kdim": 5, "vdim": 7, "batch_first": True},
    "no bias": {"bias": False},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
}


class Subclass(TransformerLayer):
    pass


class DecoderSubclass(TransformerDecoderLayer):
    pass


class AttentionSubclass(MultiHeadAttention):
    pass


def attention(options, cls=MultiHeadAttention):
    torch.manual_seed(0)
    return cls(EMBED_DIM, HEADS, **options)


def inputs(module):
    generator = torch.Generator().manual_seed(1)
    lead = (BATCH, SEQLEN) if module.batch_first else (SEQLEN, BATCH)
    return tuple(torch.randn(*lead, features, generator=generator) for features in (EMBED_DIM, module.kdim, module.vdim))


def padding():
    hidden = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("cls", [MultiHeadAttention, AttentionSubclass])
def test_scripted_attention_equals_eager(options, cls):
    module = attention(options, cls)
    scripted = torch.jit.script(module)
    tensors = inputs(module)
    floating = torch.zeros(SEQLEN, SEQLEN).masked_fill(later(), float("-inf"))
    for training in (True, False):
        module.train(training)
        scripted.train(training)
        for call in (
            {},
            {"key_padding_mask": padding(), "need_weights": False},
            {"attn_mask": later(), "average_attn_weights": False},
            {"is_causal": True},
            {"is_causal": True, "need_weights": False},
            {"is_causal": True, "key_padding_mask": padding()},
            {"is_causal": True, "attn_mask": floating},
            {"is_causal": True, "key_padding_mask": torch.zeros(BATCH, SEQLEN).masked_fill(padding(), float("-inf"))},
        ):
            torch.testing.assert_close(scripted(*tensors, **call), module(*tensors, **call))
    unbatched = [tensor[0] for tensor in tensors]
    torch.testing.assert_close(scripted(*unbatched, is_causal=True), module(*unbatched, is_causal=True))


@pytest.mark.parametrize("cls", [TransformerLayer, Subclass])
@pytest.mark.parametrize("norm_first", [False, True])
def test_scripted_layer_equals_eager(cls, norm_first):
    torch.manual_seed(0)
    layer = cls(EMBED_DIM, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    scripted = torch.jit.script(layer)
    x = torch.randn(BATCH, SEQLEN, EMBED_DIM)
    for training in (True, False):
        layer.train(training)
        scripted.train(training)
        for call in (
            {},
            {"src_key_padding_mask": padding()},
            {"src_mask": later(), "src_key_padding_mask": padding()},
            {"is_causal": True},
        ):
            torch.testing.assert_close(scripted(x, **call), layer(x, **call))


def test_scripting_a_stack_leaves_the_live_model_alone():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(TransformerLayer(EMBED_DIM, 2, 16, dropout=0.0, batch_first=True), 2)
    scripted = torch.jit.script(encoder)
    assert all(type(layer) is TransformerLayer and type(layer.self_attn) is MultiHeadAttention for layer in encoder.layers)
    x = torch.randn(BATCH, SEQLEN, EMBED_DIM)
    for training in (True, False):
        encoder.train(training)
        scripted.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(scripted(x, src_key_padding_mask=padding()), encoder(x, src_key_padding_mask=padding()))


@pytest.mark.parametrize("cls", [TransformerDecoderLayer, DecoderSubclass])
@pytest.mark.parametrize("norm_first", [False, True])
def test_scripted_decoder_layer_equals_eager(cls, norm_first):
    torch.manual_seed(0)
    layer = cls(EMBED_DIM, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    scripted = torch.jit.script(layer)
    tgt, memory = torch.randn(BATCH, SEQLEN, EMBED_DIM), torch.randn(BATCH, SEQLEN, EMBED_DIM)
    for training in (True, False):
        layer.train(training)
        scripted.train(training)
        for call in (
            {},
            {"tgt_mask": later(), "memory_key_padding_mask": padding()},
            {"tgt_is_causal": True, "tgt_key_padding_mask": padding()},
        ):
            torch.testing.assert_close(scripted(tgt, memory, **call), layer(tgt, memory, **call))


@pytest.mark.parametrize("kind", ["ours", "swapped", "foreign layers"])
def test_scripted_stacks_equal_eager_and_leave_the_live_model_alone(kind):
    torch.manual_seed(0)
    if kind == "foreign layers":
        stock = nn.Transformer(EMBED_DIM, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        replace_modules(stock, filter_fn=lambda module, name: "layers" not in name)
        model = stock
    else:
        model = (Transformer if kind == "ours" else nn.Transformer)(EMBED_DIM, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        replace_modules(model)
    before = [type(module) for module in model.modules()]
    assert type(model.encoder) is TransformerEncoder
    assert type(model.decoder) is TransformerDecoder
    scripted = torch.jit.script(model)
    assert [type(module) for module in model.modules()] == before
    src, tgt = torch.randn(BATCH, SEQLEN, EMBED_DIM), torch.randn(BATCH, SEQLEN, EMBED_DIM)
    for training in (True, False):
        model.train(training)
        scripted.train(training)
        with torch.set_grad_enabled(training):
            for call in (
                {},
                {"tgt_mask": later()},
                {"src_mask": later(), "tgt_mask": later(), "memory_mask": later()},
                {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()},
            ):
                torch.testing.assert_close(scripted(src, tgt, **call), model(src, tgt, **call))


def test_a_scripted_transformer_obeys_the_causal_hints():
    torch.manual_seed(0)
    model = Transformer(EMBED_DIM, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    src, tgt = torch.randn(BATCH, SEQLEN, EMBED_DIM), torch.randn(BATCH, SEQLEN, EMBED_DIM)
    call = {"src_is_causal": True, "tgt_is_causal": True}
    torch.testing.assert_close(torch.jit.script(model)(src, tgt, **call), model(src, tgt, src_mask=later(), tgt_mask=later()))


def test_scripted_module_can_be_saved(tmp_path):
    module = attention({"batch_first": True})
    torch.jit.script(module).save(tmp_path / "attention.pt")
    loaded = torch.jit.load(tmp_path / "attention.pt")
    torch.testing.assert_close(loaded(*inputs(module), is_causal=True), module(*inputs(module), is_causal=True))


@pytest.mark.parametrize("call", [{"src_key_padding_mask": True}, {"mask": True, "src_key_padding_mask": True}, {"is_causal": True}])
def test_an_evaluated_encoder_compiles_without_a_graph_break(call):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(TransformerLayer(EMBED_DIM, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(BATCH, SEQLEN, EMBED_DIM)
    given = {**call}
    if "src_key_padding_mask" in call:
        given["src_key_padding_mask"] = padding()
    if "mask" in call:
        given["mask"] = later()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **given), encoder(x, **given))


@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("call", [{"tgt_mask": True, "src_key_padding_mask": True}, {"tgt_is_causal": True}])
def test_a_whole_transformer_compiles_without_a_graph_break(mode, call):
    torch.manual_seed(0)
    model = Transformer(EMBED_DIM, 2, 2, 1, 16, dropout=0.0, batch_first=True).train(mode == "train")
    src, tgt = torch.randn(BATCH, SEQLEN, EMBED_DIM), torch.randn(BATCH, SEQLEN, EMBED_DIM)
    values = {"tgt_mask": later(), "src_key_padding_mask": padding(), "tgt_is_causal": True}
    given = {name: values[name] for name in call}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    with torch.set_grad_enabled(mode == "train"):
        for run in (model, compiled):
            out = run(src, tgt, **given)
            gradients = torch.autograd.grad(out.square().sum(), model.parameters()) if mode == "train" else ()
            results.append((out, *gradients))
    torch.testing.assert_close(results[1], results[0])


def test_compiled_stacks_carry_bool_masks_as_they_are():
    """A byte an element: torch's form of them, which an overridden block still gets, would be floats filled with -inf."""

    class Overriding(TransformerLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)

    called = []

    def backend(graph, _):
        called.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    x = torch.randn(BATCH, SEQLEN, EMBED_DIM)
    for cls in (TransformerLayer, Overriding):
        encoder = TransformerEncoder(cls(EMBED_DIM, 2, 16, dropout=0.0, batch_first=True), 1).eval()
        torch.compile(encoder, fullgraph=True, backend=backend)(x, mask=later(), src_key_padding_mask=padding())
    assert ["masked_fill_" in targets for targets in called] == [False, True]


def test_a_transformer_exports_with_a_causal_mask():
    """torch's own stacks read the mask's values there, which a trace cannot."""
    torch.manual_seed(0)
    model = Transformer(EMBED_DIM, 2, 1, 1, 16, batch_first=True).eval()
    tensors = torch.randn(BATCH, SEQLEN, EMBED_DIM), torch.randn(BATCH, SEQLEN, EMBED_DIM)
    call = {"tgt_mask": later(), "src_key_padding_mask": padding()}
    exported = torch.export.export(model, tensors, call).module()
    torch.testing.assert_close(exported(*tensors, **call), model(*tensors, **call))


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_compiles_with_gradients(need_weights):
    module = attention({"batch_first": True})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        tensors = [tensor.requires_grad_() for tensor in inputs(module)]
        out, weights = run(*tensors, attn_mask=later(), key_padding_mask=padding(), need_weights=need_weights)
        loss = out.square().sum() + (weights.square().sum() if need_weights else 0.0)
        results.append((out, torch.autograd.grad(loss, [*tensors, *module.parameters()])))
    torch.testing.assert_close(results[1], results[0])


def test_dynamic_lengths_compile_once():
    module = attention({"batch_first": True}).eval()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for seqlen in (5, 9, 14):
            x = torch.randn(3, seqlen, EMBED_DIM)
            hidden = torch.arange(seqlen)[None].expand(3, -1) >= seqlen - 2
            torch.testing.assert_close(
                compiled(x, x, x, key_padding_mask=hidden, is_causal=True), module(x, x, x, key_padding_mask=hidden, is_causal=True)
            )
    assert len(graphs) == 1


@pytest.mark.parametrize("need_weights", [True, False])
def test_export(need_weights):
    module = attention({"batch_first": True}).eval()
    tensors = inputs(module)
    call = {"key_padding_mask": padding(), "need_weights": need_weights}
    exported = torch.export.export(module, tensors, call).module()
    torch.testing.assert_close(exported(*tensors, **call), module(*tensors, **call))
