"""Derivatives that torch's modules lack: second ones, and forward mode, of attention, layers and stacks."""

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Transformer

D_MODEL, HEADS, BATCH, TARGETS, SOURCES = 8, 2, 3, 5, 7


def attentions():
    torch.manual_seed(0)
    stock, ours = (cls(D_MODEL, HEADS, batch_first=True, dtype=torch.float64) for cls in (nn.MultiheadAttention, MultiHeadAttention))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def transformers():
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    stock, ours = (cls(D_MODEL, HEADS, 2, 2, 16, **options) for cls in (nn.Transformer, Transformer))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def sequence(seqlen, seed=1):
    return torch.randn(BATCH, seqlen, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def later(seqlen):
    return torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)


def test_deviation_second_derivatives_of_the_fused_output():
    stock, ours = attentions()
    x = sequence(TARGETS)

    def double_backward(module):
        leaf = x.clone().requires_grad_()
        out = module(leaf, leaf, leaf, need_weights=False)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    with pytest.raises(RuntimeError, match="not implemented"):
        double_backward(stock)

    def with_weights(query, key, value, need_weights):
        return type(stock).forward(stock, query, key, value, need_weights=True)

    expected = double_backward(with_weights)  # torch's path with weights has second derivatives
    torch.testing.assert_close(double_backward(ours), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_deviation_forward_mode_derivative(need_weights):
    stock, ours = attentions()
    x, tangent = sequence(TARGETS), sequence(TARGETS).flip(1)

    def outputs(module, weights):
        return lambda query: module(query, query, query, need_weights=weights)[0]

    expected = torch.func.jvp(outputs(stock, True), (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(outputs(ours, need_weights), (x,), (tangent,)), expected)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(outputs(stock, False), (x,), (tangent,))


def test_deviation_second_derivatives_of_every_layer():
    stock, ours = transformers()

    def double_backward(model):
        src, tgt = (sequence(length, seed)[:1].requires_grad_() for length, seed in ((SOURCES, 1), (TARGETS, 2)))
        out = model(src, tgt, tgt_mask=later(TARGETS))
        gradients = torch.autograd.grad(out.square().sum(), (src, tgt), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), (src, tgt))

    with pytest.raises(RuntimeError, match="not implemented"):
        double_backward(stock)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = double_backward(stock)  # torch's plain attention has them
    torch.testing.assert_close(double_backward(ours), expected)


def test_deviation_forward_mode_derivative_of_every_layer():
    stock, ours = transformers()
    src, tgt = sequence(SOURCES), sequence(TARGETS, seed=2)

    def jvp(model):
        return torch.func.jvp(lambda src, tgt: model(src, tgt, tgt_mask=later(TARGETS)), (src, tgt), (src.flip(1), tgt.flip(1)))

    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(stock)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = jvp(stock)
    torch.testing.assert_close(jvp(ours), expected)
