"""A Llama layer, which is one call, against a decoder block written from its description."""

import copy
import math

import pytest
import torch
from torch import nn

from .layer_extras import (
    D_MODEL,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LLAMA,
    build,
    sequence,
)


class Llama(nn.Module):
    """A decoder block of Llama from its description: Touvron et al., 2023, with grouped queries; halves of a head are turned."""

    def __init__(self):
        super().__init__()
        for name, rows in {
            "q": D_MODEL,
            "k": KV_HEADS * HEAD_DIM,
            "v": KV_HEADS * HEAD_DIM,
            "o": D_MODEL,
            "gate": HIDDEN,
            "up": HIDDEN,
        }.items():
            setattr(self, name, nn.Linear(D_MODEL, rows, bias=False, dtype=torch.float64))
        self.down = nn.Linear(HIDDEN, D_MODEL, bias=False, dtype=torch.float64)
        self.input_norm, self.post_attention_norm = (nn.Parameter(torch.rand(D_MODEL, dtype=torch.float64) + 0.5) for _ in range(2))

    def forward(self, x):
        normed = self.input_norm * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        q, k, v = (project(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in (self.q, self.k, self.v))
        frequencies = 1.0 / 500.0 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM) / 2.0
        angles = torch.outer(torch.arange(x.shape[1]).double(), frequencies).repeat(1, 2).to(x.dtype)
        q, k = (y * angles.cos() + torch.cat([-y[..., HEAD_DIM // 2 :], y[..., : HEAD_DIM // 2]], -1) * angles.sin() for y in (q, k))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        scores = q @ k.mT / math.sqrt(HEAD_DIM) + torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        normed = self.post_attention_norm * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        gate = self.gate(normed)
        return x + self.down(gate / (1 + torch.exp(-gate)) * self.up(normed))

    def as_ours(self, of):
        """What `of` says of each weight, under our names."""
        return {
            "self_attn.in_proj_weight": torch.cat([of(self.q.weight), of(self.k.weight), of(self.v.weight)]),
            "self_attn.out_proj.weight": of(self.o.weight),
            "linear1.weight": torch.cat([of(self.gate.weight), of(self.up.weight)]),
            "linear2.weight": of(self.down.weight),
            "norm1.weight": of(self.input_norm),
            "norm2.weight": of(self.post_attention_norm),
        }


def test_a_llama_layer_is_one_call():
    torch.manual_seed(0)
    llama, layer = Llama(), build(LLAMA)
    layer.load_state_dict(llama.as_ours(lambda weight: weight), strict=True)
    inputs = [sequence().requires_grad_() for _ in range(2)]
    out, expected = layer(inputs[0], is_causal=True), llama(inputs[1])
    torch.testing.assert_close(out, expected)
    for result in (out, expected):
        result.backward(sequence(seed=2))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close({name: weight.grad for name, weight in layer.named_parameters()}, llama.as_ours(lambda weight: weight.grad))


def test_a_llama_layer_in_float32_is_as_exact_as_plain_pytorch():
    """Where the fused operators of the layer run."""
    torch.manual_seed(0)
    llama = Llama()
    layer = build(LLAMA, dtype=torch.float32)
    layer.load_state_dict(llama.as_ours(lambda weight: weight))
    plain = copy.deepcopy(llama).float()
    results = []
    for model, call in ((llama, {}), (plain, {}), (layer, {"is_causal": True})):
        x = sequence().to(next(model.parameters()).dtype).requires_grad_()
        out = model(x, **call)
        out.backward(sequence(seed=2).to(x.dtype))
        names = dict(model.named_parameters()) if model is layer else model.as_ours(lambda weight: weight.grad)
        results.append({"out": out, "x": x.grad} | {name: value.grad if model is layer else value for name, value in names.items()})
    truth, theirs, ours = results
    for name, exact in truth.items():
        error, plain_error = ((result[name].double() - exact).norm() / exact.norm() for result in (ours, theirs))
        assert error <= 2 * plain_error + 2**-24, name


def test_a_llama_layer_learns():
    layer = build(LLAMA, dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = sequence().float()
    losses = []
    for _ in range(20):
        loss = (layer(x, is_causal=True) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_autocast(inside):
    """The input of a first layer may come in the lower precision already, and a norm must take it."""
    layer, x = build(LLAMA), sequence()
    truth = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = copy.deepcopy(layer).float()(x.to(inside))
    assert (out.double() - truth).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
