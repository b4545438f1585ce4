"""Layers that decode with a cache give the rows of the full forward, whatever options they have.

decode(x_n ... x_m, cache of x_0 ... x_{n-1}) = layer(x, is_causal)[n ... m]        in float64, to rounding
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import MultiHeadAttention, PagedKVCache, Rotary, TransformerDecoderLayer, TransformerLayer

PARTS = (0, 6, 7, 8, 13)
OPTIONS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "sequence first": {"batch_first": False},
    "sandwich": {"norm_first": True, "sandwich": True},
    "parallel": {"norm_first": True, "parallel": "one_norm", "softcap": 3.0, "scale": 0.4},
    "two norms": {"norm_first": True, "parallel": "two_norms", "alibi": True, "sinks": True},
    "llama": {"norm_first": True, "norm": "rms", "activation": "swiglu", "num_kv_heads": 2, "rotary": Rotary(base=500.0), "bias": False},
    "heads of their own width": {"head_dim": 12, "num_kv_heads": 2, "rotary": Rotary(), "qk_norm": "layer"},
    "norms of heads": {"qk_norm": "rms", "rotary": Rotary(dim=4, interleaved=True, offset=2), "window": (5, 0)},
}


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer.double().eval()


def made(**options: Any) -> MultiHeadAttention:
    return MultiHeadAttention(32, 4, batch_first=True, **options)


def jagged(x: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged)


def rows(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_encoder_layers_decode_what_their_forward_says(options):
    options = {"batch_first": True, **options}
    layer = randomised(TransformerLayer(32, 4, 48, 0.1, **options))
    x = torch.randn(3, 13, 32, dtype=torch.float64)
    cache = layer.self_attn.new_cache(3, 15)
    with torch.no_grad():
        expected = rows(layer(rows(x, options["batch_first"]), is_causal=True), options["batch_first"])
        parts = [layer.decode(rows(x[:, a:b], options["batch_first"]), cache) for a, b in itertools.pairwise(PARTS)]
    torch.testing.assert_close(torch.cat([rows(part, options["batch_first"]) for part in parts], 1), expected)
    assert cache.lengths.tolist() == [13, 13, 13]


@pytest.mark.parametrize(
    "name", ["post-norm", "pre-norm", "sequence first", "sandwich", "llama", "heads of their own width", "norms of heads"]
)
@pytest.mark.parametrize("pages", [False, True], ids=["contiguous", "paged"])
def test_decoder_layers_decode_what_their_forward_says(name, pages):
    options = {"batch_first": True, **OPTIONS[name]}
    layer = randomised(TransformerDecoderLayer(32, 4, 48, 0.1, **options))
    x, memory = torch.randn(3, 13, 32, dtype=torch.float64), torch.randn(3, 9, 32, dtype=torch.float64)
    lengths = torch.tensor([9, 4, 1])
    text, seen = layer.self_attn.new_cache(3, 15), layer.multihead_attn.new_cache(3, 9)
    if pages:
        text, seen = (PagedKVCache(3, 24, each.kv_heads, each.head_dim, page_size=4, dtype=each.dtype) for each in (text, seen))
    with torch.no_grad():
        layer.multihead_attn.remember(rows(memory, options["batch_first"]), seen, lengths)
        expected = layer(
            rows(x, options["batch_first"]),
            rows(memory, options["batch_first"]),
            memory_key_padding_mask=torch.arange(9) >= lengths[:, None],
            tgt_is_causal=True,
        )
        parts = [layer.decode(rows(x[:, a:b], options["batch_first"]), text, seen) for a, b in itertools.pairwise(PARTS)]
    joined = torch.cat([rows(part, options["batch_first"]) for part in parts], 1)
    torch.testing.assert_close(joined, rows(expected, options["batch_first"]))
    assert seen.lengths.tolist() == lengths.tolist()


def test_a_memory_of_other_features_is_looked_at():
    module = randomised(MultiHeadAttention(32, 4, kdim=20, vdim=20, batch_first=True))
    x, memory = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 7, 20, dtype=torch.float64)
    cache = module.new_cache(2, 7)
    with torch.no_grad():
        module.remember(memory, cache)
        torch.testing.assert_close(module.look_up(x, cache), module(x, memory, memory, need_weights=False)[0])


def test_a_cache_has_the_dtype_that_autocast_projects_to():
    layer, x = TransformerLayer(32, 4, 48, 0.0, batch_first=True).eval(), torch.randn(2, 5, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = layer.self_attn.new_cache(2, 5)
        parts = [layer.decode(x[:, row : row + 1], cache) for row in range(5)]
        expected = layer(x, is_causal=True)
    assert cache.dtype is torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0.05, atol=0.05)  # a step of bfloat16 each


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda m, x: m.decode(x[0], m.new_cache(2, 9)),
            ValueError,
            r"x is of shape \(5, 32\), expected \(batch, rows, f",
        ),
        (lambda m, x: m.decode(x[..., :8], m.new_cache(2, 9)), ValueError, r"x is of shape \(2, 5, 8\)"),
        (lambda m, x: m.remember(x[..., :8], m.new_cache(2, 9)), ValueError, r"memory is of shape \(2, 5, 8\)"),
        (
            lambda m, x: m.look_up(jagged(x), m.new_cache(2, 9)),
            ValueError,
            "x is a nested tensor",
        ),
        (lambda m, x: m.decode(x, m.new_cache(2, 4)), ValueError, "capacity"),
        (lambda m, x: made(rotary=Rotary()).look_up(x, m.new_cache(2, 9)), NotImplementedError, "rotary cannot look at a cached memory"),
        (lambda m, x: made(window=(1, 1)).remember(x, m.new_cache(2, 9)), NotImplementedError, "window cannot look"),
        (lambda m, x: made(alibi=True).look_up(x, m.new_cache(2, 9)), NotImplementedError, "alibi cannot look"),
        (lambda m, x: made(kdim=32, vdim=8).remember(x, m.new_cache(2, 9)), NotImplementedError, "kdim is 32, vdim 8"),
        (lambda m, x: made(dropout=0.1).decode(x, m.new_cache(2, 9)), ValueError, r"training mode with dropout 0.1.*eval\(\)"),
        (lambda m, x: torch.enable_grad()(m.decode)(x, m.new_cache(2, 9)), ValueError, "grad"),
        (lambda m, x: MultiHeadAttention(32, 4, add_zero_attn=True).new_cache(2, 9), NotImplementedError, "add_zero_attn.*sinks=True"),
        (lambda m, x: MultiHeadAttention(32, 4, add_bias_kv=True).decode(x, m.new_cache(2, 9)), NotImplementedError, "add_bias_kv"),
    ],
)
@torch.no_grad()
def test_what_a_cache_cannot_take_is_said(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(MultiHeadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32))
