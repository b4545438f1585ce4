"""What records or converts modules by their classes: torch.jit.trace, static quantisation after a restore, version and constants."""

import copy
import io

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
    restore_modules,
)

EMBED_DIM, HEADS, BATCH, SEQLEN = 8, 2, 3, 5
CLASSES = {
    nn.MultiheadAttention: MultiHeadAttention,
    nn.TransformerEncoderLayer: TransformerLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}

pytestmark = [
    # Of torch's own, and of torch's checks of shapes, which are Python's.
    pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]


def sequence(seed=1):
    return torch.randn(BATCH, SEQLEN, EMBED_DIM, generator=torch.Generator().manual_seed(seed))


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def stock_model():
    torch.manual_seed(0)
    return nn.Transformer(EMBED_DIM, HEADS, 1, 1, 16, batch_first=True, dropout=0.0).eval()


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_traced_attention_equals_eager(need_weights):
    torch.manual_seed(0)
    ours = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=True).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ours

        def forward(self, x, mask):
            out, weights = self.attention(x, x, x, attn_mask=mask, need_weights=need_weights)
            return (out, weights) if need_weights else out

    traced = torch.jit.trace(Model(), (sequence(), later()))
    assert any("fused_attention::" in str(node.kind()) for node in traced.inlined_graph.nodes())
    torch.testing.assert_close(traced(sequence(2), later().T), Model()(sequence(2), later().T))


def test_a_traced_model_of_swapped_modules_is_saved_and_loaded():
    model = stock_model()
    expected = model(sequence(2), sequence(3), tgt_mask=later())
    replace_modules(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example_kwarg_inputs={"src": sequence(), "tgt": sequence(4), "tgt_mask": later()}), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(src=sequence(2), tgt=sequence(3), tgt_mask=later()), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams:UserWarning")
def test_static_quantisation_converts_what_was_restored():
    """torch converts exactly its own class: ours is passed over, restored it is observed."""
    from torch.ao.nn.quantizable import MultiheadAttention as Quantizable

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(EMBED_DIM, HEADS)}).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    untouched = copy.deepcopy(model)
    replace_modules(model)
    custom = {"float_to_observed_custom_module_class": {nn.MultiheadAttention: Quantizable}}
    passed_over = torch.ao.quantization.prepare(copy.deepcopy(model), prepare_custom_config_dict=custom)
    assert type(passed_over["attention"]) is MultiHeadAttention
    restore_modules(model)
    x, results = sequence(), []
    for each in (model, untouched):
        prepared = torch.ao.quantization.prepare(each, prepare_custom_config_dict=custom)
        assert isinstance(prepared["attention"], Quantizable)
        results.append(prepared["attention"](x, x, x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("stock", CLASSES, ids=lambda cls: cls.__name__)
def test_constants_version_and_attributes_are_torchs(stock):
    ours = CLASSES[stock]
    assert issubclass(ours, stock)
    assert ours._version == stock._version
    assert getattr(ours, "__constants__", None) == getattr(stock, "__constants__", None)
    assert {name for name in vars(stock) if not name.startswith("__")} <= set(dir(ours))


def test_states_carry_torchs_version():
    stock, ours = nn.MultiheadAttention(EMBED_DIM, HEADS), MultiHeadAttention(EMBED_DIM, HEADS)
    assert ours.state_dict()._metadata == stock.state_dict()._metadata
