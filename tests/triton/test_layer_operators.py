"""The layer's registered operators on the Triton kernels: the same results and gradients as plain PyTorch, in the interpreter.

The kernels themselves are judged by their own tests; this is the way to them, which on a GPU the tensors' device chooses.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.layer_ops import activation, gate, gpu, norm, rotation


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of a GPU's."""
    for module in (gate, norm, rotation):
        monkeypatch.setattr(module, "cpu", gpu)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(got: tuple[Tensor, ...], want: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    douts = [normal(*out.shape, seed=9) for out in got]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, douts), torch.autograd.grad(want, inputs, douts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("biased", [False, True])
def test_activations(name: str, biased: bool) -> None:
    inputs = [normal(3, 5, 34).requires_grad_(), *([normal(34).requires_grad_()] if biased else [])]
    x, bias = inputs[0], inputs[1] if biased else None
    got, want = gate.activate(x, bias, name), activation.apply_activation(x if bias is None else x + bias, name)
    compare((got,), (want,), inputs)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("given", [True, False])
def test_norms(kind: str, given: bool) -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in (normal(2, 5, 17), normal(2, 5, 17, seed=1), normal(17), normal(17, seed=1)))
    others = (residual, weight, bias) if given else (None, weight, None)
    out, summed, _, _ = norm.add_norm_op(x, *others, 1e-5, kind == "layer")
    want = norm.plain_add_norm(x, *others, 1e-5, kind)
    inputs = [t for t in (x, *others) if t is not None]
    compare((out, summed) if given else (out,), want if given else want[:1], inputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved: bool) -> None:
    x, angles = normal(2, 3, 5, 20).requires_grad_(), normal(5, 8)
    cos, sin = angles.cos(), angles.sin()
    got = rotation.rotate_op(x, cos, sin, interleaved, False)
    want = rotation.plain_rotate(x, cos, sin, interleaved, False)
    compare((got,), (want,), [x])
