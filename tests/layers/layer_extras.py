"""The options of the transformer layers beyond torch's: which the tests combine, and small layers made of them."""

import pytest
import torch

from fused_attention import Rotary, TransformerLayer
from fused_attention.rotary import LinearScaling

D_MODEL, HEADS, KV_HEADS, HIDDEN, BATCH, SEQLEN, MEMORY = 24, 4, 2, 20, 2, 7, 5
HEAD_DIM = D_MODEL // HEADS

LLAMA = {
    "activation": "swiglu",
    "norm_first": True,
    "bias": False,
    "norm": "rms",
    "num_kv_heads": KV_HEADS,
    "rotary": Rotary(base=500.0, scaling=LinearScaling(2.0)),
}

# What a layer is made of, beside its attention.
ARRANGEMENTS = {
    "rms, post-norm": {"norm": "rms", "layer_norm_eps": 0.01},
    "rms, pre-norm": {"norm": "rms", "norm_first": True},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu", "norm_first": True, "bias": False},
    "sandwich": {"sandwich": True, "norm_first": True},
    "parallel, one norm": {"parallel": "one_norm", "norm_first": True},
    "parallel, two norms": {"parallel": "two_norms", "norm_first": True, "norm": "rms"},
    "parallel sandwich": {"parallel": "one_norm", "sandwich": True, "norm_first": True, "activation": "swiglu"},
    "no biases of the feed-forward block": {"ff_bias": False},
    "biases of the feed-forward block alone": {"bias": False, "ff_bias": True, "activation": "swiglu"},
    "no biases of the norms": {"norm_bias": False},
    "biases of the norms alone": {"bias": False, "norm_bias": True},
    "around another attention": {"sinks": True, "qk_norm": "rms", "norm": "rms", "sandwich": True, "norm_first": True, "out_bias": False},
}
arrangements = pytest.mark.parametrize("options", ARRANGEMENTS.values(), ids=ARRANGEMENTS)

MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padding": {"src_key_padding_mask": torch.arange(SEQLEN).ge(torch.tensor([SEQLEN, 4])[:, None])},
    "bool": {"src_mask": torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(2)},
    "float and causal": {"src_mask": torch.linspace(-1, 1, SEQLEN**2, dtype=torch.float64).view(SEQLEN, SEQLEN), "is_causal": True},
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)

DECODERS = {
    "llama with a memory": LLAMA,
    "sandwich": {"sandwich": True, "norm_first": True, "norm": "rms", "activation": "geglu"},
    "attention with positions": {"window": (2, 0), "alibi": True, "rotary": Rotary(), "softcap": 2.0, "sinks": True},
    "biases": {"ff_bias": False, "norm_bias": False, "out_bias": False},
}
decoders = pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)


def build(options, cls=TransformerLayer, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = cls(D_MODEL, HEADS, HIDDEN, **{"dropout": 0.0, "batch_first": True, **options}, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return layer


def sequence(seqlen=SEQLEN, seed=1):
    return torch.randn(BATCH, seqlen, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
