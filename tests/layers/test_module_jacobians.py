"""Whole Jacobians and Hessians through modules, by torch.func: those of torch's modules where torch has them, else by differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacfwd, jacrev

from fused_attention import MultiHeadAttention, TransformerDecoderLayer, TransformerLayer

EMBED_DIM, HEADS, SEQLEN = 4, 2, 3
OPTIONS = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
# Name: torch's class, ours, and a call of x (seqlen, embed_dim).
MODULES = {
    "attention": (nn.MultiheadAttention, MultiHeadAttention, lambda module, x: module(x, x, x, attn_mask=later())),
    "encoder layer": (nn.TransformerEncoderLayer, TransformerLayer, lambda module, x: module(x, src_mask=later())),
    "decoder layer": (nn.TransformerDecoderLayer, TransformerDecoderLayer, lambda module, x: module(x, x.flip(0), tgt_mask=later())),
}

# torch's layers take their own operator, which has no rule for batches of gradients.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def inputs():
    return torch.randn(SEQLEN, EMBED_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(name):
    stock, ours, call = MODULES[name]
    pair = []
    for cls in (stock, ours):
        torch.manual_seed(0)
        more = {} if name == "attention" else {"dim_feedforward": 6, "activation": nn.functional.gelu}  # relu has no second derivative
        pair.append(cls(EMBED_DIM, HEADS, **more, **OPTIONS))
    return *pair, call


def first(result):
    """The output, and the weights' sum of squares if there are any: a function of both."""
    if not isinstance(result, tuple):
        return result
    out, weights = result
    return out if weights is None else out + weights.square().sum()


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("name", MODULES)
def test_jacobians_are_those_of_torchs_modules(name, transform):
    """torch's layers have no forward mode, and jacrev is the same matrix."""
    stock, ours, call = build(name)
    expected = jacrev(lambda x: first(call(stock, x)))(inputs())
    torch.testing.assert_close(transform(lambda x: first(call(ours, x)))(inputs()), expected)


@pytest.mark.parametrize("name", MODULES)
def test_jacobians_of_parameters(name):
    stock, ours, call = build(name)

    def of(module):
        parameters = {key: value.detach() for key, value in module.named_parameters()}
        wrapped = lambda parameters: first(call(lambda *args, **kwargs: functional_call(module, parameters, args, kwargs), inputs()))  # noqa: E731
        return jacrev(wrapped)(parameters)

    torch.testing.assert_close(of(ours), of(stock))


@pytest.mark.parametrize("name", MODULES)
def test_hessians(name):
    """Of torch's attention, whose path for weights has one; of our layers, against differences of our gradient."""
    stock, ours, call = build(name)

    def loss(module):
        return lambda x: first(call(module, x)).square().sum()

    found = hessian(loss(ours))(inputs())
    if name == "attention":
        torch.testing.assert_close(found, hessian(loss(stock))(inputs()))
        return
    gradient, step = jacrev(loss(ours)), 1e-5
    unit = torch.eye(SEQLEN * EMBED_DIM, dtype=torch.float64).view(-1, SEQLEN, EMBED_DIM) * step
    rows = [(gradient(inputs() + each) - gradient(inputs() - each)) / (2 * step) for each in unit]
    torch.testing.assert_close(found.view(-1, SEQLEN, EMBED_DIM), torch.stack(rows), rtol=1e-6, atol=1e-7)
