"""What the layer's operations promise whoever computes them: every instruction set, bits that never vary, one operator under transforms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.optests import fake_check

from fused_attention import layer_ops
from fused_attention.cpu_backend import CpuBackend
from fused_attention.layer_ops import choice, gate, norm, projection, rotation

MISSING = CpuBackend().unavailable()
compiled = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
HERE = Path(__file__).parent


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


ANGLES = normal(40, 16)
# The operators, whatever is faster here, and their plain forms.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (
        lambda x, w, b: projection.linear_op(x, w, b, None, "gelu", True)[0],
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        (normal(300, 130), normal(290, 130, seed=1), normal(290)),
    ),
    "swiglu": (
        lambda x, w, r: projection.linear_op(x, w, None, r, "swiglu", True)[0],
        lambda x, w, r: projection.plain_linear(x, w, None, r, "swiglu"),
        (normal(300, 70), normal(180, 70, seed=1), normal(300, 90)),
    ),
    "norm": (
        lambda x, r, w, b: torch.cat(norm.add_norm_op(x, r, w, b, 1e-5, True)[:2]),
        lambda x, r, w, b: torch.cat(norm.plain_add_norm(x, r, w, b, 1e-5, "layer")),
        (normal(700, 190), normal(700, 190, seed=1), normal(190), normal(190, seed=2)),
    ),
    "gate": (
        lambda x: gate.activate(x, None, "geglu"),
        lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        (normal(500, 260),),
    ),
    "rotation": (
        lambda x: rotation.rotate_op(x, ANGLES.cos(), ANGLES.sin(), False, False),
        lambda x: rotation.plain_rotate(x, ANGLES.cos(), ANGLES.sin(), False, False),
        (normal(4, 8, 40, 64),),
    ),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9))]


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_threads_change_no_bit(name: str, threads: Callable[[int], None]) -> None:
    function, _, inputs = OPERATIONS[name]
    threads(1)
    want = results(function, inputs)
    for count in (2, 5):
        threads(count)
        for a, b in zip(results(function, inputs), want, strict=True):
            assert torch.equal(a, b)


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    function, _, inputs = OPERATIONS[name]
    if name == "rotation":
        pytest.skip("its rows have no neighbours: a table of the same length goes with them")
    rows = len(inputs[0])
    some = tuple(t[100:117] if len(t) == rows else t for t in inputs)
    whole, part = function(*inputs), function(*some)
    assert torch.equal(whole.unflatten(0, (-1, rows))[:, 100:117].flatten(0, 1), part)


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_operators_under_a_compiler(name: str) -> None:
    """One operator in one graph, forward and backward, with the bits of eager."""
    function, _, inputs = OPERATIONS[name]
    torch._dynamo.reset()
    for a, b in zip(results(torch.compile(function, backend="aot_eager", fullgraph=True), inputs), results(function, inputs), strict=True):
        assert torch.equal(a, b)


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_fakes_tell_shapes_and_strides(name: str) -> None:
    function, _, inputs = OPERATIONS[name]
    fake_check(function, inputs, {})


@compiled
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name: str) -> None:
    function, plain, inputs = OPERATIONS[name]
    small = tuple(t[:3] if name != "rotation" else t for t in inputs) if name != "linear" else (inputs[0][:3], *inputs[1:])
    if name == "swiglu":
        small = (inputs[0][:3], inputs[1], inputs[2][:3])
    if name == "norm":
        small = (inputs[0][:3], inputs[1][:3], *inputs[2:])
    found = []
    for f in (function, plain):
        leaves = [t.detach().requires_grad_() for t in small]
        out = f(*leaves)
        first = torch.autograd.grad(out, leaves, normal(*out.shape).requires_grad_(), create_graph=True)
        total = sum((g * normal(*g.shape, seed=3)).sum() for g in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
        found.append([*first, *(g for g in second if g is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


WEIGHT, VECTOR = normal(64, 256) / 16, normal(512)
LAYER = {
    "linear": (lambda x: layer_ops.linear(x, WEIGHT.to(x.dtype), VECTOR[:64].to(x.dtype), activation="gelu"), normal(1024, 256)),
    "gated": (lambda x: layer_ops.gated(x), normal(1024, 512)),
    "add_norm": (lambda x: layer_ops.add_norm(x, x, VECTOR.to(x.dtype), eps=1e-5).out, normal(1024, 512)),
    "rotate": (lambda x: layer_ops.rotate(x, ANGLES.to(x.dtype).cos(), ANGLES.to(x.dtype).sin()), normal(4, 8, 40, 64)),
}


@pytest.mark.parametrize("name", LAYER)
def test_transforms_go_through_plain_pytorch(name: str) -> None:
    function, x = LAYER[name]
    tangent = normal(*x.shape, seed=5)
    out, slope = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(out, function(x), rtol=1e-4, atol=1e-4)
    there, step = x.double(), 1e-4 * tangent.double()
    torch.testing.assert_close(slope, ((function(there + step) - function(there - step)) / 2e-4).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.func.grad(lambda t: function(t).sum())(x), results_of_sum(function, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.vmap(function)(x[None])[0], function(x), rtol=1e-4, atol=1e-4)


def results_of_sum(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@compiled
@pytest.mark.parametrize("name", LAYER)
def test_who_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large float32 tensors the kernel; others, and any under autocast, plain PyTorch."""
    function, x = LAYER[name]
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    def ours() -> bool:
        calls.clear()
        with Count():
            function(x)
        return any(call.startswith("fused_attention.") for call in calls)

    pays = choice._ready("cpu") and (name != "linear" or choice.products_pay())
    assert ours() is pays
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours()
    monkeypatch.setattr(choice, "_ready", lambda kernel: False)
    assert not ours()


@pytest.mark.parametrize("name", LAYER)
def test_negated_views(name: str) -> None:
    """Memory that holds the negative of what the tensor is."""
    function, x = LAYER[name]
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(function(negated), function(x), rtol=0, atol=0)


SPECIAL = {
    "rotate": (layer_ops.rotate, (normal(2, 3, 5, 8), normal(5, 4), normal(5, 4, seed=1))),
    "linear": (layer_ops.linear, (normal(7, 24), normal(16, 24), normal(16))),
    "add_norm": (
        lambda *tensors: layer_ops.add_norm(*tensors, eps=1e-5).out,
        (normal(7, 24), normal(7, 24, seed=1), normal(24), normal(24, seed=1)),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_argument_may_be_more_than_its_memory(name: str) -> None:
    """Negated views were read raw but for the first argument; a tensor of zeros has no memory at all."""
    function, inputs = SPECIAL[name]
    for number, x in enumerate(inputs):
        for special in (torch.complex(x, -x).conj().imag, torch._efficientzerotensor(x.shape)):
            changed = [*inputs[:number], special, *inputs[number + 1 :]]
            dense = [*inputs[:number], special.resolve_neg() if special.is_neg() else torch.zeros(x.shape), *inputs[number + 1 :]]
            with torch.no_grad():
                torch.testing.assert_close(function(*changed), function(*dense), rtol=0, atol=0)


@pytest.mark.parametrize("spread", [lambda bias: bias.repeat_interleave(2)[::2], lambda bias: bias[:1].expand(bias.shape)])
def test_a_bias_of_any_stride(spread: Callable[[Tensor], Tensor]) -> None:
    """oneDNN's product reads a bias as if it were dense."""
    x, weight = (normal(512, 512, seed=seed).bfloat16() for seed in range(2))
    bias = spread(normal(512).bfloat16())
    with torch.no_grad():
        torch.testing.assert_close(layer_ops.linear(x, weight, bias), layer_ops.linear(x, weight, bias.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYER)
def test_export_keeps_to_pytorchs_operators(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return LAYER[name][0](x)

    program = torch.export.export(Module(), (LAYER[name][1],), strict=False)
    assert not [node for node in program.graph.nodes if "fused_attention" in str(node.target)]


@compiled
def test_compiled_code_takes_the_kernels() -> None:
    torch._dynamo.reset()
    targets = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    _, x = LAYER["add_norm"]
    torch.compile(lambda t: layer_ops.add_norm(t, t, None, eps=1e-5).out, backend=keep, fullgraph=True)(x)
    assert [target for target in targets if "fused_attention" in target]


@compiled
def test_products_are_counted() -> None:
    function, _, inputs = OPERATIONS["linear"]
    leaves = [t.detach().requires_grad_() for t in inputs]
    counts = []
    for call in (function, lambda x, w, b: F.linear(x, w, b)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            call(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 300 * 130 * 290


@compiled
def test_inside_a_forked_child() -> None:
    script = """
import os, torch
from fused_attention.layer_ops import projection
torch.set_num_threads(2)
x = torch.randn(150, 100)  # and few enough elements for PyTorch itself to use one thread
def run():
    return projection.linear_op(x, x, None, None, None, False)[0]
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@compiled
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    from fused_attention import _cpu

    if _cpu.isa() in (isa, "baseline"):
        pytest.skip(f"this process runs on {_cpu.isa()}: nothing below it is left to try")
    files = [str(HERE / f"test_layer_ops_{name}.py") for name in ("linear", "norm", "promises")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", *files]
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": isa}
    chosen = ["-k", "not every_instruction and not compil and not fork and not export and not transforms"]
    answer = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-3000:]
