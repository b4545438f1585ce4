"""The modules of a layer as fused operators: taken where nothing tells them from the modules, and never past a hook or another class."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fused_attention
from fused_attention.cpu_backend import CpuBackend
from fused_attention.layer_ops import choice, gate, norm, projection
from fused_attention.layers import fused

MISSING = CpuBackend().unavailable()
compiled = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
WIDTH, HEADS, SEQLEN = 24, 3, 10
ENCODER = {"post": {}, "pre": {"norm_first": True}, "relu": {"activation": "relu"}, "no bias": {"bias": False, "norm_first": True}}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whatever the size; gives the names of the operators that ran."""
    calls: list[str] = []
    monkeypatch.setattr(projection, "LEAST_FLOPS", 0)
    monkeypatch.setattr(projection, "FEWEST_ROWS", 0)
    monkeypatch.setattr(projection, "products_pay", lambda: True)
    monkeypatch.setattr(norm, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(gate, "LEAST_ELEMENTS", 0)
    for module, name in ((projection, "linear_op"), (norm, "add_norm_op"), (gate, "activate_op")):
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, calls))
    return calls


def counted(operator: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls.append(name)
        return operator(*arguments)

    return call


def pair(stock: type[nn.Module], ours: type[nn.Module], options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    return build(stock, options), build(ours, options)


def build(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, **({"dim_feedforward": 40, "dropout": 0.0, "activation": "gelu", "batch_first": True} | options))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(**options: Any) -> nn.Module:
    return build(fused_attention.TransformerLayer, options)


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = module(*leaves)
    return [out, *torch.autograd.grad(out, [*leaves, *module.parameters()], normal(*out.shape))]


@compiled
@pytest.mark.parametrize("name", ENCODER)
def test_an_encoder_layer(name: str, kernels: list[str]) -> None:
    expected, ours = pair(nn.TransformerEncoderLayer, fused_attention.TransformerLayer, ENCODER[name])
    for got, want in zip(gradients(ours, normal(2, SEQLEN, WIDTH)), gradients(expected, normal(2, SEQLEN, WIDTH)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert kernels.count("linear_op") == 4
    assert kernels.count("add_norm_op") == (1 if "norm_first" in ENCODER[name] else 2)


@compiled
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_layer(norm_first: bool, kernels: list[str]) -> None:
    expected, ours = pair(nn.TransformerDecoderLayer, fused_attention.TransformerDecoderLayer, {"norm_first": norm_first})
    inputs = normal(2, SEQLEN, WIDTH), normal(2, 7, WIDTH)
    for got, want in zip(gradients(ours, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert kernels.count("linear_op") == 7
    assert kernels.count("add_norm_op") == (2 if norm_first else 3)


@compiled
def test_a_gated_layer_without_biases(kernels: list[str]) -> None:
    ours = layer(activation="swiglu", norm="rms", bias=False, norm_first=True)
    x = normal(2, SEQLEN, WIDTH)
    got = gradients(ours, x)
    assert kernels.count("linear_op") == 4
    assert "add_norm_op" in kernels
    for got_one, want in zip(got, gradients(ours.double(), x.double()), strict=True):
        torch.testing.assert_close(got_one.double(), want, rtol=1e-4, atol=1e-5)


@compiled
def test_a_stack_compiles_to_one_graph(kernels: list[str]) -> None:
    torch._dynamo.reset()
    stack = nn.Sequential(layer(norm_first=True), layer())
    x = normal(2, SEQLEN, WIDTH)
    got = gradients(torch.compile(stack, backend="aot_eager", fullgraph=True), x)
    for a, b in zip(got, gradients(stack, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@compiled
def test_second_derivatives_of_a_layer(kernels: list[str]) -> None:
    expected, ours = pair(nn.TransformerEncoderLayer, fused_attention.TransformerLayer, {"norm_first": True})
    found = []
    for module in (ours, expected):
        x = normal(1, 5, WIDTH).requires_grad_()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    assert "linear_op" in kernels
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3 * found[1].abs().max().item())


MODULES = ["self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("norm_first", [False, True])
def test_hooks_run(name: str, norm_first: bool, kernels: list[str]) -> None:
    module = layer(norm_first=norm_first)
    x, heard = normal(2, SEQLEN, WIDTH), []
    target = module.get_submodule(name)
    for register in (target.register_forward_hook, target.register_forward_pre_hook, target.register_full_backward_hook):
        heard.clear()
        handle = register(lambda *_: heard.append(1))
        module(x.requires_grad_()).sum().backward()
        assert heard == [1]
        handle.remove()
    heard.clear()
    module(x)
    assert not heard


def test_hooks_of_every_module_run(kernels: list[str]) -> None:
    module, heard = layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda hooked, *_: heard.append(hooked))
    try:
        module(normal(2, SEQLEN, WIDTH))
    finally:
        handle.remove()
    assert {module.get_submodule(name) for name in MODULES} <= set(heard)
    assert not kernels or set(kernels) == {"linear_op"}  # in_proj_weight belongs to no module


class Adapter(nn.Linear):
    """A low-rank addition, as adapters make it: another class with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear1", "linear2"])
def test_changed_linear_layers_run(name: str, kernels: list[str]) -> None:
    x = normal(2, SEQLEN, WIDTH)
    plain = layer(norm_first=True, activation="relu")
    want = plain(x)

    def changed(change: Callable[[nn.Module], object]) -> Tensor:
        module = layer(norm_first=True, activation="relu")
        change(module.get_submodule(name))
        return module(x)

    def adapt(linear: nn.Module) -> None:
        linear.__class__ = Adapter

    def replace_forward(linear: nn.Module) -> None:
        linear.forward = lambda t: F.linear(t, linear.weight, linear.bias) + 1.0

    adapted = changed(adapt)
    assert not torch.allclose(adapted, want)
    torch.testing.assert_close(changed(replace_forward), adapted)
    torch.testing.assert_close(changed(parametrizations.weight_norm), want, rtol=1e-4, atol=1e-5)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    doubled = changed(lambda linear: parametrize.register_parametrization(linear, "weight", Double()))
    torch.testing.assert_close(changed(lambda linear: linear.weight.data.mul_(2)), doubled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(doubled, want)


def test_a_patched_class_runs(monkeypatch: pytest.MonkeyPatch, kernels: list[str]) -> None:
    module, stock = layer(), nn.Linear.forward
    assert fused.is_plain(module.linear1)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: stock(self, x) + 1.0)
    assert not fused.is_plain(module.linear1)
    torch.testing.assert_close(fused.linear_of(module.linear1, normal(3, WIDTH)), module.linear1(normal(3, WIDTH)))


def test_a_class_patched_before_the_import_runs(monkeypatch: pytest.MonkeyPatch, kernels: list[str]) -> None:
    stock = nn.Linear.forward

    @functools.wraps(stock)  # takes over the names of the module and of the function
    def wrapped(self: nn.Linear, x: Tensor) -> Tensor:
        return stock(self, x) + 1.0

    classes = tuple(fused.FORWARDS)
    assert nn.Linear in classes
    monkeypatch.setattr(nn.Linear, "forward", wrapped)
    found = fused.own_forwards(*classes)
    assert set(found) == {nn.LayerNorm, fused.RMSNorm}
    monkeypatch.setattr(fused, "FORWARDS", found)
    module = layer()
    torch.testing.assert_close(fused.linear_of(module.linear1, normal(3, WIDTH)), module.linear1(normal(3, WIDTH)))


def test_weights_that_are_not_dense_stay_with_pytorch(kernels: list[str]) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    want = linear(normal(3, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the layout a beta
        linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(fused.linear_of(linear, normal(3, WIDTH)), want, rtol=1e-4, atol=1e-5)
    assert choice.kernel_for(normal(3, WIDTH), linear.weight) is None
    assert not choice.untouched(normal(3, WIDTH), linear.weight)


@dataclasses.dataclass
class Scaled:
    """An activation that equals others of its factor, and so has no hash."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x) * self.factor


@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, torch.tanh, nn.GELU(), nn.PReLU(), Scaled(2.0)], ids=str)
def test_activations(activation: Any, kernels: list[str]) -> None:
    """A module for an activation is called, and so is a function that no kernel has."""
    ours = layer(activation=activation)
    x = normal(2, SEQLEN, WIDTH)
    hidden = activation(ours.linear1(x))
    torch.testing.assert_close(ours._ff_block(x), ours.linear2(hidden), rtol=1e-4, atol=1e-5)


@compiled
def test_small_layers_stay_with_pytorch() -> None:
    assert choice.kernel_for(normal(2, 3)) == "cpu"
    module, calls = layer(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "linear_op", counted(projection.linear_op, "linear_op", calls))
        patch.setattr(norm, "add_norm_op", counted(norm.add_norm_op, "add_norm_op", calls))
        module(normal(2, SEQLEN, WIDTH))
    assert not calls
