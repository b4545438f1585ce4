"""Every mode of the modules (train, eval, no_grad, inference_mode) under every mask, in bf16 and autocast, against torch's in training.

torch's own results differ between its modes, which the tests of deviations show; training is the one that defines them.
"""

import itertools
import warnings

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Transformer, TransformerDecoderLayer, TransformerLayer

EMBED_DIM, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 8, 2, 3, 5, 7

GUARDS = {"train": torch.enable_grad, "eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
modes = pytest.mark.parametrize("mode", GUARDS)


def sequence(seqlen, dtype=torch.float64, seed=1):
    return torch.randn(BATCH, seqlen, EMBED_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hidden(*shape, seed=2):
    """About a third of the pairs, never the first key: torch gives NaN where a query sees nothing."""
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    chosen[..., 0] = False
    return chosen


def floating(mask, dtype=torch.float64):
    added = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape)
    return added.masked_fill(mask, float("-inf")).to(dtype)


def masks(kind, seqlen_q, seqlen_k):
    """attn_mask and key_padding_mask of a kind, "bool 2-D, float" for instance."""
    attn, padding = kind.split(", ")
    attn_mask = hidden(*((seqlen_q, seqlen_k) if "2-D" in attn else (BATCH * HEADS, seqlen_q, seqlen_k)))
    key_padding_mask = hidden(BATCH, seqlen_k, seed=3)
    return (
        None if attn == "none" else floating(attn_mask) if "float" in attn else attn_mask,
        None if padding == "none" else floating(key_padding_mask) if padding == "float" else key_padding_mask,
    )


ATTN_MASKS, PADDING_MASKS = ("none", "bool 2-D", "bool 3-D", "float 2-D", "float 3-D"), ("none", "bool", "float")
KINDS = [", ".join(kind) for kind in itertools.product(ATTN_MASKS, PADDING_MASKS)]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def without_the_deprecation_of_mixed_masks():
    """It has tests of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)
        yield


def twins(stock_class, our_class, *args, **options):
    torch.manual_seed(0)
    stock = stock_class(*args, batch_first=True, **{"dtype": torch.float64, **options})
    ours = our_class(*args, batch_first=True, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@modes
@kinds
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 3, "vdim": 5}], ids=str)
def test_attention(mode, kind, options):
    stock, ours = twins(nn.MultiheadAttention, MultiHeadAttention, EMBED_DIM, HEADS, **options)
    attn_mask, key_padding_mask = masks(kind, SEQLEN_Q, SEQLEN_K)
    tensors = sequence(SEQLEN_Q), sequence(SEQLEN_K)[..., : ours.kdim], sequence(SEQLEN_K, seed=4)[..., : ours.vdim]
    for need_weights, average in ((True, True), (True, False), (False, True)):
        call = {"need_weights": need_weights, "average_attn_weights": average}
        call |= {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        expected = stock.train()(*tensors, **call)
        with GUARDS[mode]():
            torch.testing.assert_close(ours.train(mode == "train")(*tensors, **call), expected)


@modes
@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers(mode, kind, norm_first):
    options = {"dropout": 0.0, "norm_first": norm_first}
    attn_mask, key_padding_mask = masks(kind, SEQLEN_K, SEQLEN_K)
    memory_mask, memory_padding = masks(kind, SEQLEN_Q, SEQLEN_K)
    stock, ours = twins(nn.TransformerEncoderLayer, TransformerLayer, EMBED_DIM, HEADS, 16, **options)
    call = {"src_mask": attn_mask, "src_key_padding_mask": key_padding_mask}
    expected = stock.train()(sequence(SEQLEN_K), **call)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.train(mode == "train")(sequence(SEQLEN_K), **call), expected)
    stock, ours = twins(nn.TransformerDecoderLayer, TransformerDecoderLayer, EMBED_DIM, HEADS, 16, **options)
    call = {"memory_mask": memory_mask, "memory_key_padding_mask": memory_padding, "tgt_mask": hidden(SEQLEN_Q, SEQLEN_Q)}
    expected = stock.train()(sequence(SEQLEN_Q), sequence(SEQLEN_K), **call)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.train(mode == "train")(sequence(SEQLEN_Q), sequence(SEQLEN_K), **call), expected)


@modes
@kinds
def test_transformer(mode, kind):
    stock, ours = twins(nn.Transformer, Transformer, EMBED_DIM, HEADS, 2, 1, 16, dropout=0.0)
    src_mask, src_padding = masks(kind, SEQLEN_K, SEQLEN_K)
    memory_mask, _ = masks(kind, SEQLEN_Q, SEQLEN_K)
    call = {"src_mask": src_mask, "src_key_padding_mask": src_padding, "memory_mask": memory_mask, "memory_key_padding_mask": src_padding}
    expected = stock.train()(sequence(SEQLEN_K), sequence(SEQLEN_Q), **call)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.train(mode == "train")(sequence(SEQLEN_K), sequence(SEQLEN_Q), **call), expected)


def as_accurate(got, theirs, truth):
    """Half precision rounds in other places than torch's: its distance from fp64 is the measure."""
    assert got.dtype is theirs.dtype
    floor = 4 * torch.finfo(got.dtype).eps * truth.abs().max()
    return (got.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@modes
@pytest.mark.parametrize("kind", ["none, none", "bool 2-D, bool", "float 3-D, float"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "autocast"])
def test_half_precision(mode, kind, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}[precision]
    exact, _ = twins(nn.Transformer, Transformer, EMBED_DIM, HEADS, 1, 1, 16, dropout=0.0)
    exact.load_state_dict({name: value.to(dtype).double() for name, value in exact.state_dict().items()})
    stock, ours = twins(nn.Transformer, Transformer, EMBED_DIM, HEADS, 1, 1, 16, dropout=0.0, dtype=dtype)
    stock.load_state_dict(exact.state_dict())
    ours.load_state_dict(exact.state_dict())
    src_mask, src_padding = masks(kind, SEQLEN_K, SEQLEN_K)
    src, tgt = sequence(SEQLEN_K, dtype), sequence(SEQLEN_Q, dtype)
    truth = exact.train()(src.double(), tgt.double(), src_mask=src_mask, src_key_padding_mask=src_padding)
    call = {
        "src_mask": src_mask.to(dtype) if src_mask is not None and src_mask.is_floating_point() else src_mask,
        "src_key_padding_mask": src_padding.to(dtype) if src_padding is not None and src_padding.is_floating_point() else src_padding,
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        theirs = stock.train()(src, tgt, **call)
        with GUARDS[mode]():
            got = ours.train(mode == "train")(src, tgt, **call)
    assert as_accurate(got, theirs, truth)


@modes
def test_as_many_batch_members_as_positions(mode):
    """A padding mask and an attention mask of one shape are not taken for each other."""
    stock, ours = twins(nn.TransformerEncoderLayer, TransformerLayer, EMBED_DIM, HEADS, 16, dropout=0.0)
    x, chosen = sequence(BATCH), hidden(BATCH, BATCH)
    for name in ("src_mask", "src_key_padding_mask"):
        expected = stock.train()(x, **{name: chosen})
        with GUARDS[mode]():
            torch.testing.assert_close(ours.train(mode == "train")(x, **{name: chosen}), expected)


@modes
def test_more_than_a_thousand_keys(mode):
    """Where torch's fast path once failed; members end left and right of the 1024th key."""
    stock, ours = twins(nn.MultiheadAttention, MultiHeadAttention, EMBED_DIM, HEADS)
    x = torch.randn(BATCH, 1040, EMBED_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = torch.arange(1040) >= torch.tensor([1040, 1023, 1025])[:, None]
    expected = stock.train()(x[:, :3], x, x, key_padding_mask=padded)
    with GUARDS[mode]():
        torch.testing.assert_close(ours.train(mode == "train")(x[:, :3], x, x, key_padding_mask=padded), expected)
