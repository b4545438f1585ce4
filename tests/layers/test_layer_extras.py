"""What the transformer layers do beyond torch's classes, against blocks written out from the papers' formulas, in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from fused_attention import Rotary, TransformerDecoderLayer, TransformerEncoder, TransformerLayer

from .layer_extras import BATCH, D_MODEL, DECODERS, HEADS, HIDDEN, LLAMA, MASKS, MEMORY, arrangements, build, decoders, masks, sequence


def normed(kind, x, state, name, eps):
    centre = x.mean(-1, keepdim=True) if kind == "layer" else 0.0
    size = ((x - centre).square().mean(-1, keepdim=True) + eps).sqrt()
    return (x - centre) / size * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)


def fed(activation, x, state):
    x = x @ state["linear1.weight"].T + state.get("linear1.bias", 0.0)
    if activation in ("swiglu", "geglu"):
        gate, value = x[..., :HIDDEN], x[..., HIDDEN:]
        share = torch.sigmoid(gate) if activation == "swiglu" else (1 + torch.erf(gate / math.sqrt(2))) / 2
        x = gate * share * value
    else:
        x = x.clamp_min(0)
    return x @ state["linear2.weight"].T + state.get("linear2.bias", 0.0)


def definition(options, layer, x, attend):
    """The layer around attend(x), which the test of the attention's extras judges."""
    state, eps = dict(layer.named_parameters()), options.get("layer_norm_eps", 1e-5)

    def norm(name, y):
        return normed(options.get("norm", "layer"), y, state, name, eps)

    def feed(y):
        return fed(options.get("activation"), y, state)

    if not options.get("norm_first"):
        x = norm("norm1", x + attend(x))
        return norm("norm2", x + feed(x))
    behind = norm if options.get("sandwich") else lambda _, y: y
    attended = behind("after1", attend(norm("norm1", x)))
    if options.get("parallel") is None:
        x = x + attended
        return x + behind("after2", feed(norm("norm2", x)))
    second = norm("norm1" if options["parallel"] == "one_norm" else "norm2", x)
    return x + attended + behind("after2", feed(second))


@arrangements
@masks
def test_results_and_gradients_are_those_of_the_definition(options, mask):
    layer, x = build(options), sequence().requires_grad_()
    call = {
        "attn_mask": mask.get("src_mask"),
        "key_padding_mask": mask.get("src_key_padding_mask"),
        "is_causal": mask.get("is_causal", False),
    }
    expected = definition(options, layer, x, lambda y: layer.self_attn(y, y, y, need_weights=False, **call)[0])
    out = layer(x, **mask)
    torch.testing.assert_close(out, expected)
    variables, dout = [x, *layer.parameters()], sequence(seed=2)
    torch.testing.assert_close(torch.autograd.grad(out, variables, dout), torch.autograd.grad(expected, variables, dout))


@arrangements
def test_sequence_first_and_unbatched_are_the_same(options):
    layer = build(options)
    other = build({**options, "batch_first": False})
    out = layer(sequence(), is_causal=True)
    torch.testing.assert_close(other(sequence().transpose(0, 1), is_causal=True).transpose(0, 1), out)
    torch.testing.assert_close(other(sequence()[1], is_causal=True), out[1])


@pytest.mark.parametrize("cls", [TransformerLayer, TransformerDecoderLayer])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", ["ff_bias", "norm_bias", "qkv_bias", "out_bias"])
def test_each_part_has_a_bias_of_its_own(cls, bias, part):
    layer = build({"bias": bias, part: not bias}, cls)
    ends = {"ff_bias": ("linear1.bias", "linear2.bias"), "norm_bias": ("norm1.bias", "norm2.bias", "norm3.bias")}
    named = ends.get(part, (f"{'in_proj_bias' if part == 'qkv_bias' else 'out_proj.bias'}",))
    for name, _ in cls(D_MODEL, HEADS).named_parameters():
        if name.endswith("bias"):
            changed = name.endswith(named) if part in ("qkv_bias", "out_bias") else name in named
            assert (name in layer.state_dict()) == (bias != changed), name


@pytest.mark.parametrize("cls", [TransformerLayer, TransformerDecoderLayer])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_bias", [True, False, None])
def test_norms_of_heads_have_the_biases_of_the_other_norms(cls, bias, norm_bias):
    layer = build({"bias": bias, "norm_bias": norm_bias, "qk_norm": "layer"}, cls)
    biased = {name.rpartition(".")[0] for name, _ in layer.named_parameters() if name.endswith("norm.bias") or "norm1.bias" in name}
    attentions = ["self_attn"] if cls is TransformerLayer else ["self_attn", "multihead_attn"]
    norms = {"norm1", *(f"{name}.{part}_norm" for name in attentions for part in "qk")}
    assert biased == (norms if (bias if norm_bias is None else norm_bias) else set())
    assert layer.self_attn.q_norm.eps == layer.norm1.eps


@decoders
@pytest.mark.parametrize("causal", [False, True])
def test_a_decoder_layer_is_the_definition(options, causal):
    layer = build(options, TransformerDecoderLayer)
    x, memory = sequence().requires_grad_(), sequence(MEMORY, seed=3).requires_grad_()
    state = dict(layer.named_parameters())
    out = layer(x, memory, tgt_is_causal=causal, memory_key_padding_mask=torch.arange(MEMORY).ge(3).expand(BATCH, -1))

    def norm(name, y):
        return normed(options.get("norm", "layer"), y, state, name, 1e-5)

    blocks = [
        lambda y: layer.self_attn(y, y, y, is_causal=causal)[0],
        lambda y: layer.multihead_attn(y, memory[:, :3], memory[:, :3])[0],
        lambda y: fed(options.get("activation"), y, state),
    ]
    expected = x
    for place, block in enumerate(blocks, 1):
        if not options.get("norm_first"):
            expected = norm(f"norm{place}", expected + block(expected))
        elif options.get("sandwich"):
            expected = expected + norm(f"after{place}", block(norm(f"norm{place}", expected)))
        else:
            expected = expected + block(norm(f"norm{place}", expected))
    torch.testing.assert_close(out, expected)
    variables, dout = [x, memory, *layer.parameters()], sequence(seed=2)
    torch.testing.assert_close(torch.autograd.grad(out, variables, dout), torch.autograd.grad(expected, variables, dout))


def test_cross_attention_has_no_positions():
    layer = build(DECODERS["attention with positions"], TransformerDecoderLayer)
    assert layer.self_attn._fused_extras.given() == {**DECODERS["attention with positions"]}
    assert layer.multihead_attn._fused_extras.given() == {"softcap": 2.0, "sinks": True}
    alone = build({"rotary": Rotary()}, TransformerDecoderLayer)
    assert alone.multihead_attn._fused_extras is None


@pytest.mark.parametrize("cls", [TransformerLayer, TransformerDecoderLayer])
def test_heads_of_their_own_size(cls):
    """24 features do not divide among 5 heads; 5 heads of 4 do not fill them."""
    torch.manual_seed(0)
    layer = cls(D_MODEL, 5, HIDDEN, dropout=0.0, batch_first=True, head_dim=4, dtype=torch.float64)
    for attention in (part for part in layer.modules() if isinstance(part, nn.MultiheadAttention)):
        assert (attention.num_heads, attention.head_dim) == (5, 4)
        assert attention.in_proj_weight.shape == (60, D_MODEL)
        assert attention.out_proj.weight.shape == (D_MODEL, 20)
    out = layer(*(sequence(seed=seed) for seed in range(1 if cls is TransformerLayer else 2)))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_norms_kept_in_float32_in_a_layer_of_bfloat16(kind, norm_first):
    layer = build({"norm": kind, "norm_first": norm_first, "qk_norm": kind}, dtype=torch.bfloat16)
    for name, part in layer.named_modules():
        if "norm" in name:
            part.float()
    out = layer(sequence().bfloat16())
    assert out.dtype is torch.bfloat16
    truth = copy.deepcopy(layer).double()(sequence().bfloat16().double())
    assert (out.double() - truth).abs().max() < 16 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


def test_norms_of_heads_use_the_layers_eps():
    assert build({"qk_norm": "rms", "layer_norm_eps": 0.25}).self_attn.q_norm.eps == 0.25
    assert build({"qk_norm": "layer", "layer_norm_eps": 0.25, "qk_norm_eps": 0.5}).self_attn.k_norm.eps == 0.5


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("stack", [nn.TransformerEncoder, TransformerEncoder])
@pytest.mark.parametrize("options", [LLAMA, {"num_kv_heads": 2}, {"parallel": "one_norm", "norm_first": True}, {"norm": "rms"}])
def test_a_stack_of_them_evaluates_as_it_trains(stack, options):
    """torch's stack nests padded batches in evaluation where its native operator could take the layers."""
    encoder = stack(build({"activation": "relu", **options}), 2)
    x, padding = sequence(), MASKS["padding"]["src_key_padding_mask"]
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), expected)
