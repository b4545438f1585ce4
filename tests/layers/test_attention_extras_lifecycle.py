"""The life of a MultiHeadAttention with options beyond torch's: how it starts, how its state travels, and what it refuses."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Rotary

from .attention_extras import (
    BATCH,
    EMBED_DIM,
    HEADS,
    KEYS,
    QUERIES,
    build,
    extras,
    sequences,
)


@extras
def test_its_state_travels(options):
    module, other = build(options), build(options, seed=1)
    operands = sequences(module, cross=False)
    expected = module(*operands)
    other.load_state_dict(module.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(*operands), expected, rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in MultiHeadAttention(EMBED_DIM, HEADS, device="meta", **options).parameters())


@extras
def test_parameters_start_as_torchs_do(options):
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED_DIM, HEADS, **options)
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or name == "sinks":
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "proj_weight" in name:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif name == "out_proj.weight":
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.9 * bound < parameter.abs().max() <= bound
        else:
            assert name in ("bias_k", "bias_v")
            assert parameter.any()
    empty = MultiHeadAttention(EMBED_DIM, HEADS, device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(math.nan)
    empty._reset_parameters()
    left = {name for name, parameter in empty.named_parameters() if not parameter.isfinite().all()}
    assert left == {"out_proj.weight"}, "torch leaves this one too"


def test_without_extras_nothing_is_drawn_or_added():
    for options in ({}, {"window": None, "rotary": None, "sinks": False, "qk_norm_eps": 1e-6, "num_kv_heads": None}):
        torch.manual_seed(0)
        ours = MultiHeadAttention(EMBED_DIM, HEADS, **options)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        stock = nn.MultiheadAttention(EMBED_DIM, HEADS)
        assert torch.equal(torch.get_rng_state(), state)
        assert vars(ours).keys() == vars(stock).keys()
        torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=0, atol=0)
        assert ours._fused_extras is None
        assert repr(ours).replace("MultiHeadAttention", "MultiheadAttention") == repr(stock)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@extras
def test_torchscript_refuses_in_a_sentence(options):
    module = build(options)
    for target in (module, nn.Sequential(module)):
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit\.script cannot compile a MultiHeadAttention with .*: use torch\.compile"
        ):
            torch.jit.script(target)


WRONG_OPTIONS = {
    "head dim": (ValueError, "head_dim is 0, expected an int of at least 1", {"head_dim": 0}),
    "heads": (ValueError, "num_kv_heads is 3, num_heads 4: expected an int that divides", {"num_kv_heads": 3}),
    "no heads": (ValueError, "num_kv_heads is 0, num_heads 4", {"num_kv_heads": 0}),
    "rotary": (TypeError, "rotary is True, expected a Rotary", {"rotary": True}),
    "rotary too wide": (ValueError, "rotary turns 8 elements of a head_dim of 6", {"rotary": Rotary(dim=8)}),
    "norm": (ValueError, 'qk_norm is True, expected "rms" or "layer"', {"qk_norm": True}),
    "eps of no norm": (ValueError, "qk_norm_eps is 0.1 and qk_norm is None", {"qk_norm_eps": 0.1}),
    "window of one": (TypeError, "window is 3, expected a pair (left, right)", {"window": 3}),
    "window of -1": (ValueError, "window is (-1, 0), expected each side to be an int of at least 0", {"window": (-1, 0)}),
    "softcap": (ValueError, "softcap is 0.0, expected a finite number above 0", {"softcap": 0.0}),
    "scale": (ValueError, "scale is nan, expected a finite number", {"scale": math.nan}),
    "sinks": (TypeError, "sinks is None, expected True or False", {"sinks": None}),
    "alibi": (TypeError, "alibi is 1, expected True or False", {"alibi": 1}),
    "biases": (TypeError, "out_bias is 'no', expected True or False", {"out_bias": "no"}),
    "added keys of fewer heads": (
        ValueError,
        "add_bias_kv=True adds a key of 4 heads, num_kv_heads is 2",
        {"add_bias_kv": True, "num_kv_heads": 2},
    ),
    "added keys in a window": (ValueError, "window counts distances, and the keys of add_bias_kv", {"add_bias_kv": True, "window": (0, 0)}),
    "added keys at a distance": (ValueError, "alibi counts distances", {"add_zero_attn": True, "alibi": True}),
}


@pytest.mark.parametrize(("error", "sentence", "options"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options_say_what_is_wrong(error, sentence, options):
    with pytest.raises(error, match=re.escape(sentence)):
        MultiHeadAttention(EMBED_DIM, HEADS, **options)


X, Y = torch.zeros(BATCH, QUERIES, EMBED_DIM), torch.zeros(BATCH, KEYS, EMBED_DIM)
WRONG_CALLS = {
    "four dimensions": (ValueError, "query has shape (2, 5, 24, 1), expected 2 or 3 dimensions", (X[..., None], Y, Y), {}),
    "unlike dimensions": (ValueError, "key has shape (7, 24), expected 3 dimensions", (X, Y[0], Y[0]), {}),
    "features": (ValueError, "query has 23 features, expected 24", (X[..., 1:], Y, Y), {}),
    "keys and values": (ValueError, "key has shape (2, 7, 24), value (2, 5, 24): all but the features must agree", (X, Y, X), {}),
    "batches": (ValueError, "query has batch 2, key 1 (batch_first=True): they must be equal", (X, Y[:1], Y[:1]), {}),
    "padding mask": (ValueError, "key_padding_mask has shape (7, 2), expected (2, 7)", (X, Y, Y), {"key_padding_mask": torch.zeros(7, 2)}),
    "mask": (ValueError, "attn_mask has shape (7, 5), expected (5, 7) or (8, 5, 7)", (X, Y, Y), {"attn_mask": torch.zeros(7, 5)}),
    "mask of ints": (TypeError, "attn_mask is torch.int64 on cpu", (X, Y, Y), {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}),
    "dtypes": (TypeError, "query is torch.float64 on cpu, key is torch.float32 on cpu", (X.double(), Y, Y), {}),
}


@pytest.mark.parametrize(("error", "sentence", "operands", "call"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong(error, sentence, operands, call):
    with pytest.raises(error, match=re.escape(sentence)):
        build({"num_kv_heads": 2}, dtype=torch.float32)(*operands, **call)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    module = build({"sinks": True}, dtype=torch.float32).eval()
    nested = torch.nested.nested_tensor([X[0], X[0, :3]], layout=layout)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="query is a nested tensor, and this module has extras: pad it"):
        module(nested, nested, nested)
