"""Where decoder layers, stacks and the Transformer mean to differ from torch's, one test a deviation."""

import pytest
import torch
from torch import nn

from fused_attention import Transformer, TransformerDecoderLayer, TransformerEncoder, TransformerLayer

D_MODEL, HEADS, BATCH, TARGETS, SOURCES = 8, 2, 3, 5, 7

GUARDS = {"train": torch.enable_grad, "eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
modes = pytest.mark.parametrize("mode", GUARDS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


def build_pair(**options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
    stock, ours = (cls(D_MODEL, HEADS, 2, 2, 16, **options) for cls in (nn.Transformer, Transformer))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def sequence(seqlen, seed=1):
    return torch.randn(BATCH, seqlen, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def later(seqlen_q, seqlen_k=None):
    return torch.ones(seqlen_q, seqlen_k or seqlen_q, dtype=torch.bool).triu(1)


def padding(seqlen=SOURCES):
    hidden = torch.zeros(BATCH, seqlen, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


@modes
@pytest.mark.parametrize("padded", [False, True])
def test_deviation_a_causal_decoder_layer_needs_no_mask(mode, padded):
    stock, ours = (model.decoder.layers[0] for model in build_pair())
    tensors = sequence(TARGETS), sequence(SOURCES, seed=2)
    call = {"tgt_key_padding_mask": padding(TARGETS), "memory_key_padding_mask": padding()} if padded else {}
    expected = stock.train()(*tensors, tgt_mask=later(TARGETS), memory_mask=later(TARGETS, SOURCES), **call)
    with GUARDS[mode]():
        got = ours.train(mode == "train")(*tensors, tgt_is_causal=True, memory_is_causal=True, **call)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        if not padded:  # torch forgets the hint, or asks for a mask
            assert not torch.allclose(stock.eval()(*tensors, tgt_is_causal=True), expected)
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            stock.train()(*tensors, tgt_is_causal=True, **call)


@modes
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_deviation_causal_stacks_need_no_mask_and_combine_with_one(mode, padded, masked):
    stock, ours = build_pair()
    tensors = sequence(SOURCES), sequence(TARGETS, seed=2)
    some = torch.zeros(SOURCES, SOURCES, dtype=torch.bool)
    some[4, 2] = True
    call = {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()} if padded else {}
    explicit = {"src_mask": later(SOURCES) | some if masked else later(SOURCES)}
    explicit |= {"tgt_mask": later(TARGETS), "memory_mask": later(TARGETS, SOURCES)}
    expected = stock.train()(*tensors, **explicit, **call)
    with GUARDS[mode]():
        call |= {"src_mask": some} if masked else {}
        got = ours.train(mode == "train")(*tensors, src_is_causal=True, tgt_is_causal=True, memory_is_causal=True, **call)
    torch.testing.assert_close(got, expected)


@modes
@pytest.mark.parametrize("norm_first", [False, True])
def test_deviation_targets_that_see_no_memory_get_the_bias_and_finite_gradients(mode, norm_first):
    """A batch member whose memory is padding alone: torch's evaluation answers NaN."""
    stock, ours = (model.decoder.layers[0] for model in build_pair(norm_first=norm_first))
    hidden = padding()
    hidden[2] = True
    tgt, memory = sequence(TARGETS).requires_grad_(), sequence(SOURCES, seed=2).requires_grad_()
    with GUARDS[mode]():
        out = ours.train(mode == "train")(tgt, memory, memory_key_padding_mask=hidden)
    expected = stock.train()(tgt, memory, memory_key_padding_mask=hidden)  # torch's training hides them too, by SDPA's safe softmax
    torch.testing.assert_close(out, expected)
    if out.requires_grad:
        gradients = torch.autograd.grad(out.square().sum(), [tgt, memory, *ours.parameters()])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[1][2] == 0).all()


@modes
def test_deviation_padded_members_give_no_nan_in_an_encoder(mode):
    _, ours = (model.encoder for model in build_pair())
    hidden = padding()
    hidden[2] = True
    with GUARDS[mode]():
        out = ours.train(mode == "train")(sequence(SOURCES), src_key_padding_mask=hidden)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_deviation_an_evaluated_encoder_equals_a_trained_one_at_padded_positions_too(mode, norm_first):
    stock, ours = (model.encoder for model in build_pair(norm_first=norm_first))
    call = {"src_key_padding_mask": padding()}
    expected = stock.train()(sequence(SOURCES), **call)
    torch.testing.assert_close(ours.train()(sequence(SOURCES), **call), expected)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.eval()(sequence(SOURCES), **call), expected)
    if not norm_first:
        with torch.no_grad():  # torch nests the batch and fills what was padded: with zeros, which the last norm then sees
            stock.norm = None
            assert (stock.eval()(sequence(SOURCES), **call)[padding()] == 0).all()


def test_deviation_an_evaluated_encoder_hands_layers_the_padded_batch():
    """torch's own hands them a nested tensor, which hooks and layers of other kinds then meet in evaluation alone."""
    nested = []
    for model in build_pair():
        model.encoder.layers[1].register_forward_pre_hook(lambda _, args: nested.append(args[0].is_nested))
        with torch.no_grad():
            model.encoder.eval()(sequence(SOURCES), src_key_padding_mask=padding())
    assert nested == [True, False]


@modes
def test_deviation_overridden_blocks_of_layers_in_stacks_run_in_evaluation(mode):
    class Halved(TransformerLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * 0.5

    torch.manual_seed(0)
    layer = Halved(D_MODEL, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    plain = TransformerLayer(D_MODEL, HEADS, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        plain.linear2.weight *= 0.5
        plain.linear2.bias *= 0.5
    with GUARDS[mode]():
        got, expected = (
            TransformerEncoder(each, 2).train(mode == "train")(sequence(SOURCES), src_key_padding_mask=padding()) for each in (layer, plain)
        )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [True, False])
def test_deviation_cpu_autocast_is_seen_by_every_stack(training):
    """torch's encoder nests the padded batch under CPU autocast, and its fast path then fails on the dtypes."""
    stock, ours = build_pair(dtype=torch.float32)
    src, tgt = sequence(SOURCES).float(), sequence(TARGETS, seed=2).float()
    with torch.no_grad():
        expected = ours.train(training)(src, tgt, src_key_padding_mask=padding())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ours(src, tgt, src_key_padding_mask=padding())
            if not training:
                with pytest.raises(RuntimeError):
                    stock.eval()(src, tgt, src_key_padding_mask=padding())
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=64 * torch.finfo(torch.bfloat16).eps)


def test_deviation_hooks_on_the_output_projections_of_a_decoder_layer_run():
    calls = []
    for layer, expected in zip((nn.TransformerDecoderLayer, TransformerDecoderLayer), (0, 2), strict=True):
        layer = layer(D_MODEL, HEADS, 16, batch_first=True, dtype=torch.float64)
        calls.clear()
        for attention in (layer.self_attn, layer.multihead_attn):
            attention.out_proj.register_forward_hook(lambda *_: calls.append(1))
        layer(sequence(TARGETS), sequence(SOURCES))
        assert len(calls) == expected


def test_deviation_exported_stacks_take_causal_masks():
    """torch's own compare the mask's values, which a trace cannot."""

    class Encode(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, src, mask):
            return self.model.encoder(src, mask=mask)

    stock, ours = (Encode(model).eval() for model in build_pair())
    call = sequence(SOURCES), later(SOURCES)
    torch.testing.assert_close(torch.export.export(ours, call).module()(*call), stock.train()(*call))
    with pytest.raises(Exception, match=r"data-dependent|Could not guard"):
        torch.export.export(stock.eval(), call, strict=True)


@pytest.mark.parametrize("causal", [False, True])
def test_deviation_hooks_on_the_attention_see_bool_masks_or_the_hint(causal):
    """torch's layers hand their attention floating masks, and the hint beside the mask."""
    hidden = later(SOURCES)
    hidden[5, 2] = not causal
    seen = []
    for model in build_pair():
        model.encoder.layers[0].self_attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        model.encoder(sequence(SOURCES), mask=hidden, src_key_padding_mask=padding())
    stock, ours = seen
    assert list(stock) == list(ours)
    assert stock["attn_mask"].dtype is stock["key_padding_mask"].dtype is torch.float64
    assert ours["key_padding_mask"].dtype is torch.bool
    assert stock["is_causal"] is ours["is_causal"] is causal
    assert ours["attn_mask"] is None if causal else ours["attn_mask"].dtype is torch.bool
