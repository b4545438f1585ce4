"""Wrong calls of the modules: torch's own module beside ours, the same exception type and text, also under `python -O`.

Run as a script it prints what each call raises, for the test that starts it with -O.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

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
)

EMBED_DIM, HEADS, BATCH, SEQLEN = 8, 2, 3, 4
BOOL = torch.bool


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def nested():
    return torch.nested.nested_tensor([torch.zeros(4, EMBED_DIM), torch.zeros(2, EMBED_DIM)])


CONSTRUCTOR_ERRORS = {
    "no heads": lambda cls: cls(8, 0),
    "negative embed_dim": lambda cls: cls(-8, 2),
    "heads do not divide": lambda cls: cls(9, 2),
}

# query, key, value and the masks of a call; batch first, 3 members of 4 positions.
X, U = (BATCH, SEQLEN, EMBED_DIM), (SEQLEN, EMBED_DIM)
CALL_ERRORS = {
    "1-D query": lambda: ((zeros(8), zeros(8), zeros(8)), {}),
    "4-D query": lambda: ((zeros(1, *X), zeros(1, *X), zeros(1, *X)), {}),
    "2-D key": lambda: ((zeros(*X), zeros(*U), zeros(*X)), {}),
    "3-D key of unbatched": lambda: ((zeros(*U), zeros(*X), zeros(*X)), {}),
    "1-D key_padding_mask": lambda: ((zeros(*X),) * 3, {"key_padding_mask": zeros(4, dtype=BOOL)}),
    "2-D key_padding_mask of unbatched": lambda: ((zeros(*U),) * 3, {"key_padding_mask": zeros(3, 4, dtype=BOOL)}),
    "1-D attn_mask": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(4, dtype=BOOL)}),
    "4-D attn_mask": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(3, 2, 4, 4, dtype=BOOL)}),
    "3-D attn_mask of unbatched": lambda: ((zeros(*U),) * 3, {"attn_mask": zeros(4, 4, 4, dtype=BOOL)}),
    "2-D attn_mask size": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(5, 4, dtype=BOOL)}),
    "2-D attn_mask that would broadcast": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(1, 4, dtype=BOOL)}),
    "3-D attn_mask size": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(3, 4, 4)}),
    "key_padding_mask keys": lambda: ((zeros(*X),) * 3, {"key_padding_mask": zeros(3, 5, dtype=BOOL)}),
    "key_padding_mask batch": lambda: ((zeros(*X),) * 3, {"key_padding_mask": zeros(2, 4, dtype=BOOL)}),
    "key_padding_mask that would broadcast": lambda: ((zeros(*X),) * 3, {"key_padding_mask": zeros(1, 4, dtype=BOOL)}),
    "int attn_mask": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(4, 4, dtype=torch.int64)}),
    "uint8 key_padding_mask": lambda: ((zeros(*X),) * 3, {"key_padding_mask": zeros(3, 4, dtype=torch.uint8)}),
    "int key_padding_mask beside a bool attn_mask": lambda: (
        (zeros(*X),) * 3,
        {"key_padding_mask": zeros(3, 4, dtype=torch.int32), "attn_mask": zeros(4, 4, dtype=BOOL)},
    ),
    "query features": lambda: ((zeros(3, 4, 9), zeros(*X), zeros(*X)), {}),
    "features of all": lambda: ((zeros(3, 4, 9),) * 3, {}),
    "key features": lambda: ((zeros(*X), zeros(3, 4, 9), zeros(3, 4, 9)), {}),
    "key and value lengths": lambda: ((zeros(*X), zeros(*X), zeros(3, 5, 8)), {}),
    "key batch": lambda: ((zeros(*X), zeros(2, 4, 8), zeros(2, 4, 8)), {}),
    "float64 query": lambda: ((zeros(*X, dtype=torch.float64), zeros(*X), zeros(*X)), {}),
    "float16 inputs": lambda: ((zeros(*X, dtype=torch.float16),) * 3, {}),
    "int inputs": lambda: ((zeros(*X, dtype=torch.int64),) * 3, {}),
    "float64 attn_mask": lambda: ((zeros(*X),) * 3, {"attn_mask": zeros(4, 4, dtype=torch.float64)}),
    "nested": lambda: ((nested(),) * 3, {}),
    "nested key": lambda: ((zeros(2, 4, 8), *(nested(),) * 2), {}),
    "nested with a mask": lambda: ((nested(),) * 3, {"key_padding_mask": zeros(2, 4, dtype=BOOL)}),
}
SEPARATE_ERRORS = {
    "key features of kdim": lambda: ((zeros(*X), zeros(3, 4, 5), zeros(3, 4, 7)), {}),
    "key and value lengths of kdim": lambda: ((zeros(*X), zeros(3, 4, 6), zeros(3, 5, 7)), {}),
}
LAYER_CONSTRUCTOR_ERRORS = {
    "unknown activation": lambda cls: cls(EMBED_DIM, HEADS, activation="silu"),
    "heads do not divide": lambda cls: cls(9, 2),
}
LAYER_ERRORS = {
    "1-D src": lambda: (zeros(8), {}),
    "4-D src": lambda: (zeros(1, *X), {}),
    "src features": lambda: (zeros(3, 4, 9), {}),
    "src_mask size": lambda: (zeros(*X), {"src_mask": zeros(5, 4, dtype=BOOL)}),
    "3-D src_mask size": lambda: (zeros(*X), {"src_mask": zeros(3, 4, 4, dtype=BOOL)}),
    "int src_mask": lambda: (zeros(*X), {"src_mask": zeros(4, 4, dtype=torch.int64)}),
    "uint8 src_key_padding_mask": lambda: (zeros(*X), {"src_key_padding_mask": zeros(3, 4, dtype=torch.uint8)}),
    "src_key_padding_mask size": lambda: (zeros(*X), {"src_key_padding_mask": zeros(3, 5, dtype=BOOL)}),
    "src_key_padding_mask that would broadcast": lambda: (zeros(*X), {"src_key_padding_mask": zeros(1, 4, dtype=BOOL)}),
    "nested with a mask": lambda: (nested(), {"src_key_padding_mask": zeros(2, 4, dtype=BOOL)}),
    "float64 src": lambda: (zeros(*X, dtype=torch.float64), {}),
}
DECODER_ERRORS = {
    "1-D tgt": lambda: ((zeros(8), zeros(*X)), {}),
    "4-D tgt": lambda: ((zeros(1, *X), zeros(*X)), {}),
    "2-D memory": lambda: ((zeros(*X), zeros(*U)), {}),
    "tgt features": lambda: ((zeros(3, 4, 9), zeros(*X)), {}),
    "memory features": lambda: ((zeros(*X), zeros(3, 4, 9)), {}),
    "memory batch": lambda: ((zeros(*X), zeros(2, 4, 8)), {}),
    "tgt_mask size": lambda: ((zeros(*X), zeros(*X)), {"tgt_mask": zeros(5, 4, dtype=BOOL)}),
    "memory_mask size": lambda: ((zeros(*X), zeros(3, 6, 8)), {"memory_mask": zeros(4, 4, dtype=BOOL)}),
    "3-D memory_mask size": lambda: ((zeros(*X), zeros(3, 6, 8)), {"memory_mask": zeros(3, 4, 6)}),
    "int tgt_mask": lambda: ((zeros(*X), zeros(*X)), {"tgt_mask": zeros(4, 4, dtype=torch.int64)}),
    "uint8 memory_key_padding_mask": lambda: ((zeros(*X), zeros(*X)), {"memory_key_padding_mask": zeros(3, 4, dtype=torch.uint8)}),
    "tgt_key_padding_mask size": lambda: ((zeros(*X), zeros(*X)), {"tgt_key_padding_mask": zeros(3, 5, dtype=BOOL)}),
    "memory_key_padding_mask of tgt": lambda: ((zeros(*X), zeros(3, 6, 8)), {"memory_key_padding_mask": zeros(3, 4, dtype=BOOL)}),
    "float64 memory": lambda: ((zeros(*X), zeros(*X, dtype=torch.float64)), {}),
    "nested tgt": lambda: ((nested(), zeros(2, 4, 8)), {}),
    "nested memory": lambda: ((zeros(2, 4, 8), nested()), {}),
}
MODEL_ERRORS = {
    "batches": lambda: ((zeros(*X), zeros(2, 4, 8)), {}),
    "features of src": lambda: ((zeros(3, 4, 9), zeros(*X)), {}),
    "features of tgt": lambda: ((zeros(*X), zeros(3, 4, 7)), {}),
    "int src_mask": lambda: ((zeros(*X), zeros(*X)), {"src_mask": zeros(4, 4, dtype=torch.int64)}),
    "uint8 src_key_padding_mask": lambda: ((zeros(*X), zeros(*X)), {"src_key_padding_mask": zeros(3, 4, dtype=torch.uint8)}),
    "src_mask size": lambda: ((zeros(*X), zeros(*X)), {"src_mask": zeros(5, 4, dtype=BOOL)}),
    "tgt_mask size": lambda: ((zeros(*X), zeros(*X)), {"tgt_mask": zeros(5, 5, dtype=BOOL)}),
    "tgt_key_padding_mask size": lambda: ((zeros(*X), zeros(*X)), {"tgt_key_padding_mask": zeros(3, 5)}),
}
PLAIN_LAYER, PLAIN_DECODER_LAYER = nn.TransformerEncoderLayer(EMBED_DIM, HEADS), nn.TransformerDecoderLayer(EMBED_DIM, HEADS)
OUR_LAYER = TransformerLayer(EMBED_DIM, HEADS, batch_first=True)


def calls():
    """Name -> a function that makes a wrong call of a MultiheadAttention class."""
    made = dict(CONSTRUCTOR_ERRORS)
    for mode in ("training", "evaluation"):
        for need_weights in (True, False):
            for name, arguments in CALL_ERRORS.items():
                made[f"{name}, {mode}, need_weights={need_weights}"] = _call(arguments, mode, need_weights)
            for name, arguments in SEPARATE_ERRORS.items():
                made[f"{name}, {mode}, need_weights={need_weights}"] = _call(arguments, mode, need_weights, kdim=6, vdim=7)
    for dropout in (1.5, -0.5):
        for need_weights in (True, False):
            made[f"dropout {dropout}, need_weights={need_weights}"] = _call(
                lambda: ((zeros(*X),) * 3, {}), "training", need_weights, dropout=dropout
            )
    made["nested, batch second"] = _call(CALL_ERRORS["nested"], "evaluation", False, batch_first=False)
    made["nested, no bias"] = _call(CALL_ERRORS["nested"], "evaluation", False, bias=False)
    made["float32 mask on bfloat16"] = _call(
        lambda: ((zeros(*X, dtype=torch.bfloat16),) * 3, {"attn_mask": zeros(4, 4)}), "training", True, dtype=torch.bfloat16
    )
    made["half a key bias"] = _half_a_bias
    return made


def _call(arguments, mode, need_weights, **options):
    def call(cls):
        torch.manual_seed(0)
        module = cls(EMBED_DIM, HEADS, **{"batch_first": True, **options}).train(mode == "training")
        tensors, masks = arguments()
        with torch.set_grad_enabled(mode == "training"):
            module(*tensors, need_weights=need_weights, **masks)

    return call


def _half_a_bias(cls):
    module = cls(EMBED_DIM, HEADS, add_bias_kv=True)
    module.bias_v = None
    module(zeros(*X), zeros(*X), zeros(*X))


def outcome(call, cls):
    """The exception's type and text, or None where the call succeeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors announce themselves as a prototype
        try:
            call(cls)
        except Exception as error:  # noqa: BLE001  whatever it is, it is compared
            return [type(error).__name__, str(error)]
    return None


@pytest.mark.parametrize("call", calls().values(), ids=calls())
def test_attention_refuses_what_torch_refuses(call):
    assert outcome(call, MultiHeadAttention) == outcome(call, nn.MultiheadAttention)


def test_the_calls_are_wrong():
    """But for what torch takes in evaluation: a nested tensor; and a negative dropout, which it ignores with weights."""
    accepted = {name for name, call in calls().items() if outcome(call, nn.MultiheadAttention) is None}
    assert accepted == {
        "nested, evaluation, need_weights=True",
        "nested, evaluation, need_weights=False",
        "dropout -0.5, need_weights=True",
    }


@pytest.mark.parametrize("call", LAYER_CONSTRUCTOR_ERRORS.values(), ids=LAYER_CONSTRUCTOR_ERRORS)
def test_layer_constructor_refuses_what_torchs_refuses(call):
    expected = outcome(call, nn.TransformerEncoderLayer)
    assert expected is not None
    assert outcome(call, TransformerLayer) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_layer_refuses_what_torch_refuses(arguments, training):
    def call(cls):
        src, masks = arguments()
        with torch.set_grad_enabled(training):
            cls(EMBED_DIM, HEADS, 16, batch_first=True).train(training)(src, **masks)

    expected = outcome(call, nn.TransformerEncoderLayer)
    assert expected is not None
    assert outcome(call, TransformerLayer) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", DECODER_ERRORS.values(), ids=DECODER_ERRORS)
def test_decoder_layer_refuses_what_torch_refuses(arguments, training):
    def call(cls):
        tensors, masks = arguments()
        with torch.set_grad_enabled(training):
            cls(EMBED_DIM, HEADS, 16, batch_first=True).train(training)(*tensors, **masks)

    expected = outcome(call, nn.TransformerDecoderLayer)
    assert expected is not None
    assert outcome(call, TransformerDecoderLayer) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", MODEL_ERRORS.values(), ids=MODEL_ERRORS)
def test_transformer_refuses_what_torch_refuses(arguments, training):
    def call(cls):
        tensors, masks = arguments()
        with torch.set_grad_enabled(training):
            cls(EMBED_DIM, HEADS, 1, 1, 16, batch_first=True).train(training)(*tensors, **masks)

    expected = outcome(call, nn.Transformer)
    assert expected is not None
    assert outcome(call, Transformer) == expected


@pytest.mark.parametrize("training", [True, False])
def test_deviation_an_evaluated_encoder_refuses_padding_as_in_training(training):
    """torch's, which makes a nested tensor of the batch, then complains of a mask that does not match input sizes."""

    def call(cls, training):
        with torch.set_grad_enabled(training):
            cls(OUR_LAYER, 1).train(training)(zeros(*X), src_key_padding_mask=zeros(3, 5))

    expected = outcome(lambda cls: call(cls, True), nn.TransformerEncoder)
    assert expected[0] == "AssertionError"
    assert outcome(lambda cls: call(cls, training), TransformerEncoder) == expected
    if not training:
        assert outcome(lambda cls: call(cls, training), nn.TransformerEncoder) != expected


@pytest.mark.parametrize(
    ("ours", "stock", "call"),
    [
        (TransformerDecoderLayer, nn.TransformerDecoderLayer, lambda cls: cls(EMBED_DIM, HEADS, activation="silu")),
        (TransformerDecoderLayer, nn.TransformerDecoderLayer, lambda cls: cls(9, HEADS)),
        (Transformer, nn.Transformer, lambda cls: cls(EMBED_DIM, HEADS, activation="silu")),
        (Transformer, nn.Transformer, lambda cls: cls(EMBED_DIM, 0)),
        (TransformerEncoder, nn.TransformerEncoder, lambda cls: cls(PLAIN_LAYER, 0)(zeros(*X))),
        (TransformerEncoder, nn.TransformerEncoder, lambda cls: cls(PLAIN_LAYER, "2")),
        (TransformerDecoder, nn.TransformerDecoder, lambda cls: cls(PLAIN_DECODER_LAYER, 0)(zeros(*X), zeros(*X))),
        (TransformerDecoder, nn.TransformerDecoder, lambda cls: cls(PLAIN_DECODER_LAYER, 1)(zeros(*X))),
    ],
)
def test_constructors_and_empty_stacks_refuse_what_torchs_refuse(ours, stock, call):
    expected = outcome(call, stock)
    assert expected is not None
    assert outcome(call, ours) == expected


@pytest.mark.parametrize(
    "name", ["2-D attn_mask size", "3-D attn_mask size", "query features", "int attn_mask", "key batch", "4-D query", "2-D key"]
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_call_is_refused_as_without_the_hint(name, need_weights):
    """With the hint torch drops a mask unread, or complains that there is none."""
    tensors, masks = CALL_ERRORS[name]()
    module = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=True)
    refused = [
        outcome(lambda _, hint=hint: module(*tensors, **masks, need_weights=need_weights, is_causal=hint), None) for hint in (False, True)
    ]
    assert refused[0] is not None
    assert refused[1] == refused[0]


def test_optimised_python_refuses_the_same():
    """Nothing is checked by an assert statement, which -O removes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = subprocess.run([sys.executable, "-O", Path(__file__)], env=environment, capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stderr
    assert json.loads(script.stdout) == {name: outcome(call, MultiHeadAttention) for name, call in calls().items()}


if __name__ == "__main__":
    print(json.dumps({name: outcome(call, MultiHeadAttention) for name, call in calls().items()}))
