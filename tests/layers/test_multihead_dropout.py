"""MultiHeadAttention's dropout: one mask for output and weights, drawn from the seed in training alone, distributed as torch's."""

import pytest
import torch
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


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_dropped_weights_are_the_ones_that_made_the_output(average, causal):
    ours = build({"dropout": 0.4})
    query, key, value = inputs(ours)
    torch.manual_seed(5)
    out, weights = ours(query, key, value, average_attn_weights=False, is_causal=causal)
    v = torch.nn.functional.linear(value, ours.in_proj_weight[2 * EMBED_DIM :], ours.in_proj_bias[2 * EMBED_DIM :])
    heads = weights @ v.view(SEQLEN_K, BATCH, HEADS, -1).permute(1, 2, 0, 3)
    torch.testing.assert_close(ours.out_proj(heads.permute(2, 0, 1, 3).flatten(2)), out)
    assert (weights == 0).any()
    if average:
        torch.manual_seed(5)
        torch.testing.assert_close(ours(query, key, value, is_causal=causal)[1], weights.mean(1))


def test_dropout_follows_the_seed_and_only_draws_in_training():
    ours = build({"dropout": 0.5})
    tensors = inputs(ours)
    torch.manual_seed(6)
    first, second = ours(*tensors)[0], ours(*tensors)[0]
    torch.manual_seed(6)
    torch.testing.assert_close(ours(*tensors)[0], first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ours.eval()(*tensors)
    ours.train().dropout = 0.0
    ours(*tensors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_equals_torchs_in_distribution(need_weights):
    """One query repeated over a large batch: mean and variance of the output over the batch agree within six standard errors."""
    copies = 3000
    stock, ours = build_pair({"dropout": 0.3})
    query, key, value = (tensor[:, :1].expand(-1, copies, -1) for tensor in inputs(ours))
    torch.manual_seed(7)
    samples = [module(query, key, value, need_weights=need_weights)[0].detach() for module in (stock, ours)]
    expected = ours.eval()(query[:, :1], key[:, :1], value[:, :1])[0][:, 0]
    spread = samples[0].std(1)
    assert ((samples[1].mean(1) - expected).abs() <= 6 * spread / copies**0.5).all()
    assert ((samples[1].std(1) / spread - 1).abs() <= 6 / copies**0.5 * 2).all()


def test_dropout_of_one_leaves_the_bias():
    ours = build({"dropout": 1.0})
    with torch.no_grad():
        ours.out_proj.bias.fill_(0.5)
    out, weights = ours(*inputs(ours))
    assert (out == 0.5).all()
    assert (weights == 0).all()
