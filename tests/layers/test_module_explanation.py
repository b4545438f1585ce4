"""explain of a module: each attention call inside it, by submodule, with nothing computed and nothing changed."""

import copy
import threading

import pytest
import torch
from torch import nn

from fused_attention import (
    Explanation,
    MultiHeadAttention,
    Transformer,
    TransformerLayer,
    attention,
    backend,
    backends,
    explain,
    replace_modules,
)

D_MODEL, HEADS, BATCH, SEQLEN = 64, 2, 2, 5


def sequence():
    return torch.zeros(BATCH, SEQLEN, D_MODEL)


def model(**options):
    return Transformer(D_MODEL, HEADS, 1, 1, 16, dropout=0.0, batch_first=True, **options)


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def test_every_attention_is_named_with_its_backend_and_the_reasons():
    found = explain(model(), sequence(), sequence(), tgt_is_causal=True)
    assert list(found) == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    q = torch.zeros(BATCH, SEQLEN, HEADS, D_MODEL // HEADS, requires_grad=True).transpose(1, 2)
    assert found["encoder.layers.0.self_attn"] == explain(q, q, q)
    assert found["decoder.layers.0.self_attn"] == explain(q, q, q, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_are_asked_about_the_problem_of_the_call(dtype, causal, masked, monkeypatch):
    monkeypatch.setattr(backend.KERNELS["cpu"], "unavailable", lambda: None)
    monkeypatch.setattr(
        backend.KERNELS["cpu"],
        "unsupported",
        lambda problem: f"{problem.dtype}, {tuple(problem.q.shape)}, {problem.window_right}, {problem.mask is not None}",
    )
    x = sequence().to(dtype)
    mask = later().flip(0) if masked else None
    found = explain(TransformerLayer(D_MODEL, HEADS, batch_first=True, dtype=dtype), x, src_mask=mask, is_causal=causal)
    shape = (BATCH, HEADS, SEQLEN, D_MODEL // HEADS)
    assert found["self_attn"].reasons["cpu"] == f"{dtype}, {shape}, {0 if causal else None}, {masked}"


@pytest.mark.parametrize("enabled", [True, False])
def test_needed_gradients_are_facts_of_the_call(enabled, monkeypatch):
    seen = []

    def unsupported(problem):
        seen.append(problem.gradients)
        return "not this one"

    monkeypatch.setattr(backend.KERNELS["cpu"], "unavailable", lambda: None)
    monkeypatch.setattr(backend.KERNELS["cpu"], "unsupported", unsupported)

    class Plain(nn.Module):
        def forward(self, q):
            return attention(q, q, q)

    with torch.set_grad_enabled(enabled):
        explain(TransformerLayer(D_MODEL, HEADS), sequence())
        explain(Plain(), torch.zeros(BATCH, HEADS, SEQLEN, 4, requires_grad=True))
    assert set(seen) == {frozenset("qkv") if enabled else frozenset()}


def test_nothing_runs_and_nothing_changes():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(SEQLEN), TransformerLayer(D_MODEL, HEADS, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.layer(self.norm(x))

    network = Counting()
    state, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    attributes = {name: dict(vars(module)) for name, module in network.named_modules()}
    found = explain(network, torch.randn(BATCH, SEQLEN, D_MODEL))
    assert list(found) == ["layer.self_attn"]
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    torch.set_rng_state(generator)
    before = torch.get_rng_state()
    explain(network, sequence())
    assert torch.equal(torch.get_rng_state(), before)


class Caching(nn.Module):
    """Keeps in attributes what it makes at its first call, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(D_MODEL, HEADS, batch_first=True)
        self.positions, self.tables, self.calls = None, {}, 0

    def forward(self, x):
        self.calls += 1
        if self.positions is None:
            self.positions = self.tables["positions"] = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return self.attention(x + self.positions, x, x)[0]


def test_what_a_forward_keeps_in_attributes_stays_as_it_was():
    network = Caching()
    assert list(explain(network, sequence())) == ["attention"]
    assert (network.positions, network.tables, network.calls) == (None, {}, 0)
    assert type(network(sequence())) is torch.Tensor
    kept = network.positions
    explain(network, sequence())
    assert (network.positions is kept, network.calls) == (True, 1)


def test_a_forward_assigned_to_an_instance_is_named_though_it_holds_the_original():
    outer = nn.Sequential(TransformerLayer(D_MODEL, HEADS, batch_first=True))
    layer = outer[0]
    layer.forward = lambda x: TransformerLayer.forward(layer, x)
    assert list(explain(outer, sequence())) == ["0.self_attn"]


def test_what_cannot_be_copied_is_refused_in_a_sentence():
    layer = TransformerLayer(D_MODEL, HEADS, batch_first=True)
    layer.lock = threading.Lock()
    with pytest.raises(NotImplementedError, match=r"explain runs a copy of TransformerLayer, which cannot be copied \(.*lock.*\): explain"):
        explain(layer, sequence())
    layer.lock, layer.product = None, layer.linear1.weight * 2  # a tensor that deepcopy refuses
    assert list(explain(layer, sequence())) == ["self_attn"]


def test_modules_of_other_threads_are_none_of_its():
    """One begins before the call and ends inside it, another the other way round."""
    began, end, ended = threading.Event(), threading.Event(), []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Identity()

        def forward(self, q):
            q = self.child(q)
            return attention(q, q, q)

    class Waiting(nn.Module):
        def forward(self, x):
            began.set()
            end.wait(30)
            return x

    def run():
        module = Waiting()
        module.register_forward_hook(lambda *_: None)  # with hooks of its own, a call that has begun looks for those of all modules too
        ended.append(module(1))

    def finish_one_and_begin_another(*_):
        end.set()
        threads[0].join()
        end.clear()
        began.clear()
        threads[1].start()
        began.wait(30)

    threads = [threading.Thread(target=run), threading.Thread(target=run)]
    threads[0].start()
    began.wait(30)
    outer = Outer()
    outer.child.register_forward_pre_hook(finish_one_and_begin_another)
    found = explain(outer, torch.zeros(BATCH, HEADS, SEQLEN, 4))
    end.set()
    threads[1].join()
    assert list(found) == [""]
    assert ended == [1, 1]


def test_other_modules_that_call_attention_and_calls_that_repeat():
    class Twice(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return attention(q, q, q) + attention(q, q, q, causal=True, backend="torch")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def forward(self, x):
            q = self.inner(x)
            return attention(q, q, q) + self.inner(x)

    found = explain(Outer(), sequence())
    assert list(found) == ["inner", "inner (call 2)", "", "inner (call 3)", "inner (call 4)"]
    assert found["inner (call 2)"].backend == "torch"
    assert list(explain(Twice(), sequence())) == ["", " (call 2)"]
    assert set(found["inner"].reasons) == set(backends())


def test_torchs_layers_at_inference_do_not_call_the_attention_inside_them():
    """Why an attention alone is not enough to swap, and how a user sees it."""
    layer = nn.TransformerEncoderLayer(D_MODEL, HEADS, batch_first=True).eval()
    replace_modules(layer, filter_fn=lambda module, name: name == "self_attn")
    with torch.no_grad():
        assert explain(layer, sequence()) == {}
        replace_modules(layer)
        assert list(explain(layer, sequence())) == ["self_attn"]


def test_values_that_are_read_are_named():
    stock = nn.TransformerEncoder(TransformerLayer(D_MODEL, HEADS, batch_first=True), 1)
    with pytest.raises(NotImplementedError, match=r"explain runs TransformerEncoder without data, and the model itself reads values"):
        explain(stock, sequence(), mask=later())
    replace_modules(stock)
    assert list(explain(stock, sequence(), mask=later())) == ["layers.0.self_attn"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(SEQLEN, D_MODEL), torch.zeros(2, D_MODEL)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="takes no nested tensors"):
        explain(TransformerLayer(D_MODEL, HEADS, batch_first=True), nested)


def test_what_the_call_would_raise_is_raised_and_no_hook_stays():
    hooks = [dict(nn.modules.module._global_forward_pre_hooks), dict(nn.modules.module._global_forward_hooks)]
    with pytest.raises(AssertionError, match="embedding dimension"):
        explain(TransformerLayer(D_MODEL, HEADS), torch.zeros(SEQLEN, BATCH, D_MODEL + 1))
    assert [dict(nn.modules.module._global_forward_pre_hooks), dict(nn.modules.module._global_forward_hooks)] == hooks


def test_tensors_are_explained_as_before():
    q = torch.zeros(1, 2, 3, 4)
    assert isinstance(explain(q, k=q, v=q, causal=True), Explanation)
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        explain(q, q, q, casual=True)
