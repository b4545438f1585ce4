"""A token decoded with a cache gets what it gets in the whole forward, for every kind of cache, option and backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fused_attention import KVCache, PagedKVCache, Rotary, apply_rotary, attention, attention_with_cache, backends, explain
from fused_attention.rotary import LinearScaling, Scaling
from fused_attention.testing import Case, check
from fused_attention.torch_backend import TorchBackend

from .cached_calls import KINDS, feed, make

RUNNABLE = [name for name, reason in backends().items() if reason is None]
CHUNKS = (11, 1, 1, 5, 1, 2, 1)
BASE = Case("cached", heads=6, kv_heads=2, seqlen_q=sum(CHUNKS), seqlen_k=sum(CHUNKS), head_dim=16, causal=True)
CASES = {
    "grouped": BASE,
    "head_dim_v": replace(BASE, heads=2, head_dim=9, head_dim_v=5, layout="strided"),
    "options": replace(BASE, window=(7, None), softcap=2.0, sinks=True, alibi_slopes="h", scale=0.4),
    "left padding": replace(BASE, kv_lengths=((4, 22), (0, 22)), alibi_slopes="bh"),
}


def options_of(inputs):
    return {name: value for name, value in inputs.options.items() if name != "kv_lengths"}


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_rows_of_the_whole_forward(name, kind, backend, monkeypatch):
    inputs = CASES[name].make()
    cache = make(kind, inputs, 22, monkeypatch)
    if "kv_lengths" in inputs.options:
        cache.pad_left(inputs.options["kv_lengths"][:, 0])
    check(feed(inputs, cache, CHUNKS, backend=backend, **options_of(inputs)), inputs.truth(backward=False))
    assert cache.lengths.tolist() == [22, 22]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["contiguous", "pages of 5"])
def test_every_type_is_cached(kind, dtype):
    inputs = BASE.make(dtype=dtype)
    check(feed(inputs, make(kind, inputs, 22), CHUNKS, causal=True), inputs.truth(backward=False))


@pytest.mark.parametrize("kind", ["contiguous", "pages of 16"])
def test_a_cache_that_grows_past_what_calls_are_shown_at_once(kind):
    """Calls see slots by the hundred; a cache of 260 tokens takes them past a boundary of these."""
    chunks = (250, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    inputs = replace(BASE, batch=1, heads=2, kv_heads=1, seqlen_q=260, seqlen_k=260).make()
    check(feed(inputs, make(kind, inputs, 1000), chunks, causal=True), inputs.truth(backward=False))


@pytest.mark.parametrize("kind", KINDS)
def test_what_unused_slots_hold_changes_no_bit(kind, monkeypatch):
    inputs = CASES["left padding"].make()
    found = []
    for filling in (torch.nan, 0.0):
        cache = make(kind, inputs, 40, monkeypatch)
        cache.k.fill_(filling)
        cache.v.fill_(filling)
        cache.pad_left(torch.tensor([4, 0]))
        found.append(feed(inputs, cache, CHUNKS, **options_of(inputs)))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_is_never_seen(kind, monkeypatch):
    inputs = CASES["left padding"].make()
    k, v = inputs.k.clone(), inputs.v.clone()
    k[0, :, :4] = v[0, :, :4] = torch.nan
    cache = make(kind, inputs, 22, monkeypatch)
    cache.pad_left(torch.tensor([4, 0], dtype=torch.int32))
    check(feed(inputs.changed(k=k, v=v), cache, CHUNKS, **options_of(inputs)), inputs.truth(backward=False))


@pytest.mark.parametrize("tables", [False, True], ids=["Rotary", "tables"])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_turned_by_their_positions(kind, tables, monkeypatch):
    """Counted from a member's start, so that padding turns nobody further."""
    rotary = Rotary(dim=8, interleaved=True, offset=3, scaling=LinearScaling(2.0))
    inputs = CASES["left padding"].make()
    cos, sin = rotary.tables(22, 16)
    positions = torch.arange(22) - torch.tensor([[4], [0]])
    turned = {name: apply_rotary(getattr(inputs, name), cos, sin, positions=positions, interleaved=True) for name in "qk"}
    cache = make(kind, inputs, 22, monkeypatch)
    cache.pad_left(torch.tensor([4, 0]))
    given = {"rotary": (cos, sin), "interleaved": True} if tables else {"rotary": rotary}
    out = feed(inputs, cache, CHUNKS, **given, **options_of(inputs))
    check(out, inputs.changed(**turned).truth(backward=False))
    for member, start in enumerate((4, 0)):  # the distances alone would be right wherever the first row stood
        assert torch.equal(cache.keys_of([0, 1])[0][member, :, start:22], turned["k"][member, :, start:])


def test_tables_need_no_row_for_padding():
    inputs, rotary = CASES["left padding"].make(), Rotary()
    cache = make("contiguous", inputs, 22)
    cache.pad_left(torch.tensor([4, 4]))
    cache.append(inputs.k[:, :, :10], inputs.v[:, :, :10])
    last = {name: getattr(inputs, name)[:, :, 10:11] for name in "qkv"}
    attention_with_cache(last["q"], cache, k=last["k"], v=last["v"], rotary=tuple(rotary.tables(7, 16)))
    with pytest.raises(ValueError, match="cos has 7 positions, and a row can come to stand at 7: make longer tables"):
        attention_with_cache(last["q"], cache, k=last["k"], v=last["v"], rotary=tuple(rotary.tables(7, 16)))


@pytest.mark.parametrize("new", [3, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_queries_than_new_keys_are_turned_as_the_last(kind, new, monkeypatch):
    inputs, rotary = BASE.make(), Rotary()
    tables = rotary.tables(22, 16)
    turned = {name: apply_rotary(getattr(inputs, name), *tables) for name in "qk"}
    cache = make(kind, inputs, 30, monkeypatch)
    cache.append(turned["k"][:, :, : 22 - new], inputs.v[:, :, : 22 - new])
    more = {"k": inputs.k[:, :, 22 - new :], "v": inputs.v[:, :, 22 - new :]} if new else {}
    out = attention_with_cache(inputs.q[:, :, 20:], cache, rotary=rotary, causal=True, **more)
    check(out, inputs.changed(q=turned["q"][:, :, 20:], k=turned["k"]).truth(backward=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_only_read(kind, monkeypatch):
    """Cross-attention: keys once, queries as often as needed; each call leaves the cache as it was."""
    inputs = Case("cross", heads=4, kv_heads=2, seqlen_q=6, seqlen_k=13, kv_lengths=(13, 8)).make()
    cache = make(kind, inputs, 13, monkeypatch)
    cache.append(inputs.k, inputs.v, new_lengths=torch.tensor([13, 8]))
    out = torch.cat([attention_with_cache(inputs.q[:, :, :2], cache), attention_with_cache(inputs.q[:, :, 2:], cache)], 2)
    check(out, inputs.truth(backward=False))
    assert cache.lengths.tolist() == [13, 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [[1, 1], [1, 0], [0, 0, 1, 1, 0], [1]])
def test_beams_go_on_from_the_members_they_are_told(kind, index, monkeypatch):
    inputs = BASE.make()
    cache = make(kind, inputs, 33, monkeypatch)
    cache.pad_left(torch.tensor([0, 2]))
    feed(inputs, cache, (9, 1), causal=True)
    cache.reorder(torch.tensor(index))
    assert (cache.batch, cache.lengths.tolist(), cache.starts.tolist()) == (len(index), [10] * len(index), [2 * each for each in index])
    for members, row in ((index, 10), (index[::-1], 11)):  # each beam with a token of its own
        q, k, v = (x[members, :, row : row + 1] for x in (inputs.q, inputs.k, inputs.v))
        out = attention_with_cache(q, cache, k=k, v=v)
    for beam, first in enumerate(index):
        keys = [(first, slice(0, 10)), (index[beam], slice(10, 11)), (index[::-1][beam], slice(11, 12))]
        k, v = (torch.cat([x[member : member + 1, :, rows] for member, rows in keys], 2) for x in (inputs.k, inputs.v))
        ranges = torch.tensor([[2 * first, 12]])
        check(out[beam : beam + 1], inputs.changed(q=q[beam : beam + 1], k=k, v=v, options={"kv_lengths": ranges}).truth(backward=False))


def test_members_of_a_paged_cache_are_computed_alone():
    """Continuous batching: some members go on, others wait, are freed, and give their place to new ones."""
    inputs = replace(BASE, batch=3).make()
    cache = make("pages of 5", inputs, 22)
    outs = {member: [] for member in range(3)}
    for members, rows in (((2,), (0, 7)), ((0, 2), (7, 9)), ((1, 0), (9, 12)), ((2, 1, 0), (12, 13))):
        q, k, v = (x[list(members), :, slice(*rows)] for x in (inputs.q, inputs.k, inputs.v))
        out = attention_with_cache(q, cache, k=k, v=v, members=members, causal=True)
        for place, member in enumerate(members):
            outs[member].append((out[place], range(*rows)))
    for member, parts in outs.items():
        rows = [row for _, run in parts for row in run]
        alone = inputs.changed(**{name: getattr(inputs, name)[member : member + 1, :, rows] for name in "qkv"})
        check(torch.cat([out for out, _ in parts], 1)[None], alone.truth(backward=False))


def test_under_autocast_and_inference_mode():
    inputs = BASE.make()
    with torch.inference_mode():
        cache = KVCache(2, 30, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention_with_cache(inputs.q, cache, k=inputs.k, v=inputs.v, causal=True)
    cache.truncate(0)
    with torch.inference_mode():
        plain = attention_with_cache(*(x.bfloat16() for x in (inputs.q,)), cache, k=inputs.k.bfloat16(), v=inputs.v.bfloat16(), causal=True)
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("backend", [None, *RUNNABLE])
@pytest.mark.parametrize("kind", ["contiguous", "pages of 5"])
def test_explain_names_who_runs(kind, backend):
    inputs = BASE.make()
    cache = make(kind, inputs, 22)
    explanation = explain(inputs.q, cache, k=inputs.k, v=inputs.v, causal=True, rotary=Rotary(), backend=backend)
    shown = explain(inputs.q, inputs.k, inputs.v, kv_lengths=torch.tensor([22, 22]), backend=backend)
    assert (explanation.backend, explanation.reasons) == (shown.backend, shown.reasons)
    assert cache.lengths.tolist() == [0, 0]
    with pytest.raises(TypeError, match="of a cache got mask: it takes the options of attention_with_cache"):
        explain(inputs.q, cache, mask=torch.ones(1, dtype=torch.bool))


def test_explain_of_a_module_appends_nothing_to_its_cache():
    class Step(torch.nn.Module):
        def forward(self, x, cache):
            return attention_with_cache(x, cache, k=x, v=x, causal=True)

    x, step = torch.randn(2, 2, 3, 16), Step()
    for cache in (KVCache(2, 10, 2, 16), PagedKVCache(2, 4, 2, 16)):
        cache.append(x, x)
        before = cache.k.clone()
        assert explain(step, x, cache)[""].backend == explain(x, cache).backend
        assert (cache.lengths.tolist(), cache.bound) == ([3, 3], 3)
        torch.testing.assert_close(cache.k, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["contiguous", "pages of 5"])
def test_a_demanded_backend_runs(kind, monkeypatch):
    inputs, ran = BASE.make(), []
    original = TorchBackend.forward
    monkeypatch.setattr(TorchBackend, "forward", lambda *arguments: ran.append(True) or original(*arguments))
    feed(inputs, make(kind, inputs, 22), (20, 1, 1), causal=True, backend="torch")
    assert len(ran) == 3
    feed(inputs, make(kind, inputs, 22), (20, 1, 1), causal=True, backend="reference")
    assert len(ran) == 3


@dataclass
class Changing(Scaling):
    """Nothing forbids that a scaling changes, or that it has no hash, as this."""

    factor: float

    def apply(self, frequencies, base):
        return frequencies / self.factor


def test_tables_of_a_scaling_that_may_change_are_not_remembered():
    inputs, scaling, found = BASE.make(), Changing(1.0), []
    for factor in (2.0, 3.0):
        scaling.factor = factor
        pair = [KVCache(2, 30, 2, 16) for _ in range(2)]
        mine, ours = Rotary(scaling=scaling), Rotary(scaling=LinearScaling(factor))
        outs = [feed(inputs, cache, (22,), causal=True, rotary=rotary) for cache, rotary in zip(pair, (mine, ours), strict=True)]
        assert torch.equal(*outs)
        found.append(outs[0])
    assert not torch.equal(*found)


def test_tables_made_by_a_tracer_are_not_remembered():
    """They hold no numbers, and the next call would turn by them."""
    q, rotary = BASE.make().q, Rotary(base=777.0)
    found = []
    for traced in (True, False):
        cache = KVCache(2, 30, 6, 16)
        if traced:
            explain(Turning(rotary), q, cache)
        found.append(attention_with_cache(q, cache, k=q, v=q, rotary=rotary))
    assert torch.equal(*found)


class Turning(torch.nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, cache):
        return attention_with_cache(x, cache, k=x, v=x, rotary=self.rotary)


def test_a_demanded_backend_that_cannot_run_leaves_the_cache_alone():
    inputs = BASE.make()
    for kind in ("contiguous", "pages of 5"):
        cache = make(kind, inputs, 22)
        with pytest.raises(NotImplementedError, match="backend='cuda' can't run this call: "):
            attention_with_cache(inputs.q, cache, k=inputs.k, v=inputs.v, backend="cuda")
        assert cache.lengths.tolist() == [0, 0]


def test_a_cached_call_equals_attention_on_the_same_keys_in_every_bit():
    """Rows of a cache are strided: they are read where they are, by the kernel that reads any keys."""
    inputs = BASE.make()
    cache = make("contiguous", inputs, 22)
    out = feed(inputs, cache, (21, 1), causal=True)
    whole = attention(inputs.q[:, :, 21:], inputs.k, inputs.v, causal=True)
    assert torch.equal(out[:, :, 21:], whole)


def test_a_compiled_step_equals_the_eager_one():
    """Without a break of the graph, over lengths that grow."""
    inputs = BASE.make()
    caches = [make("contiguous", inputs, 22) for _ in range(2)]
    steps = [attention_with_cache, torch.compile(attention_with_cache, fullgraph=True, backend="eager")]
    for row in range(4):
        q, k, v = (x[:, :, row : row + 1] for x in (inputs.q, inputs.k, inputs.v))
        outs = [step(q, cache, k=k, v=v, causal=True, rotary=Rotary()) for step, cache in zip(steps, caches, strict=True)]
        torch.testing.assert_close(*outs)
    assert caches[1].lengths.tolist() == [4, 4]
