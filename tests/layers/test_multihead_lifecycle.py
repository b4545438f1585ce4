"""MultiHeadAttention over its life: changed between calls, saved and loaded, copied, built without memory, quantised around."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attention.layers import MultiHeadAttention

EMBED_DIM, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 12, 3, 2, 5, 7


def build(options, cls=MultiHeadAttention, dtype=torch.float64):
    torch.manual_seed(0)
    return cls(EMBED_DIM, HEADS, **options, dtype=dtype)


def build_pair(options):
    """The same weights in both, with biases that are not zero."""
    stock, ours = build(options, nn.MultiheadAttention), build(options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(module):
    draw = torch.Generator().manual_seed(1)
    shapes = [(BATCH, seqlen) if module.batch_first else (seqlen, BATCH) for seqlen in (SEQLEN_Q, SEQLEN_K, SEQLEN_K)]
    return tuple(torch.randn(*shape, EMBED_DIM, generator=draw, dtype=torch.float64) for shape in shapes)


def test_parameters_and_options_are_read_at_every_call():
    stock, ours = build_pair({"dropout": 0.9})
    tensors = inputs(ours)
    ours(*tensors)
    for module in (stock, ours):
        module.dropout = 0.0
        module.in_proj_weight = nn.Parameter(module.in_proj_weight.detach() * 2)
        module.out_proj.weight.data = module.out_proj.weight.data.flip(0)
        module.in_proj_bias.data.add_(0.5)
    torch.testing.assert_close(ours(*tensors), stock(*tensors))


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}])
def test_torchs_function_takes_the_modules_attributes(options):
    """As other libraries call it, with every attribute of a module."""
    ours = build(options)
    query, key, value = inputs(ours)
    key, value = key[..., : ours.kdim], value[..., : ours.vdim]
    torch.testing.assert_close(ours(query, key, value), through_torchs_function(ours, query, key, value))


def test_torchs_function_takes_static_keys_beside_the_modules_attributes():
    """Keys and values that are projected already, one head of one member after another: those of the module give its own output."""
    ours = build({})
    query, key, value = inputs(ours)
    _, k_weight, v_weight = ours.in_proj_weight.chunk(3)
    _, k_bias, v_bias = ours.in_proj_bias.chunk(3)
    projected = (F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias))
    k, v = (x.reshape(SEQLEN_K, BATCH * ours.num_heads, ours.head_dim).transpose(0, 1) for x in projected)
    torch.testing.assert_close(through_torchs_function(ours, query, key, value, static_k=k, static_v=v), ours(query, key, value))
    with pytest.raises(AssertionError, match="bias cannot be added to static key"):
        through_torchs_function(build({"add_bias_kv": True}), query, key, value, static_k=k, static_v=v)


def through_torchs_function(module, query, key, value, **options):
    separate = not module._qkv_same_embed_dim
    return F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        module.dropout,
        module.out_proj.weight,
        module.out_proj.bias,
        training=module.training,
        use_separate_proj_weight=separate,
        **({name: getattr(module, name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")} if separate else {}),
        **options,
    )


def test_merged_masks_are_torchs():
    stock, ours = build_pair({"batch_first": True})
    query = inputs(ours)[0]
    later = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, SEQLEN_Q, dtype=torch.bool)
    for masks in ((None, None), (later, None), (None, padding), (later, padding)):
        torch.testing.assert_close(ours.merge_masks(*masks, query), stock.merge_masks(*masks, query))


def test_old_checkpoints_without_the_shared_dimension_flag_load():
    ours = build({})
    state = ours.__dict__.copy()
    del state["_qkv_same_embed_dim"]
    loaded = MultiHeadAttention.__new__(MultiHeadAttention)
    loaded.__setstate__(state)
    tensors = inputs(ours)
    torch.testing.assert_close(loaded(*tensors), ours(*tensors), rtol=0, atol=0)


def test_pickle_deepcopy_and_repr():
    stock, ours = build_pair({"add_bias_kv": True})
    tensors = inputs(ours)
    expected = ours(*tensors)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin) is MultiHeadAttention
        torch.testing.assert_close(twin(*tensors), expected, rtol=0, atol=0)
    assert repr(ours).replace("MultiHeadAttention", "MultiheadAttention") == repr(stock)


@pytest.mark.parametrize("need_weights", [True, False])
def test_meta_device(need_weights):
    ours = build({"batch_first": True}).to("meta")
    tensors = [tensor.to("meta") for tensor in inputs(ours)]
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool, device="meta")
    out, weights = ours(*tensors, need_weights=need_weights, key_padding_mask=padding, is_causal=True)
    assert out.is_meta
    assert out.shape == tensors[0].shape
    assert weights is None or weights.shape == (BATCH, SEQLEN_Q, SEQLEN_K)
    ours.to_empty(device="cpu")._reset_parameters()
    assert all(torch.isfinite(parameter).all() for name, parameter in ours.named_parameters() if name.startswith("in_proj"))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_dynamic_quantisation_leaves_the_output_projection():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(build({}, dtype=torch.float32)), {nn.Linear})
    assert type(quantised[0]) is MultiHeadAttention
    assert type(quantised[0].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
