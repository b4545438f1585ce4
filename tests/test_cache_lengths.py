"""How many rows a member of a cache holds: prompts of different lengths, truncation, padding, and what a host that cannot look counts."""

from __future__ import annotations

import pytest
import torch

from fused_attention import Rotary, attention_with_cache, host
from fused_attention.testing import Case, check

from .cached_calls import KINDS, feed, make

CHUNKS = (11, 1, 1, 5, 1, 2, 1)
BASE = Case("cached", heads=6, kv_heads=2, seqlen_q=sum(CHUNKS), seqlen_k=sum(CHUNKS), head_dim=16, causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_tokens_are_gone(kind, monkeypatch):
    inputs = BASE.make()
    cached = make(kind, inputs, 22, monkeypatch)
    feed(inputs.changed(k=inputs.k + 1, v=inputs.v + 1), cached, (20,))
    cached.truncate(torch.tensor([3, 7]))
    assert cached.lengths.tolist() == [3, 7]
    cached.truncate(5)
    assert cached.lengths.tolist() == [3, 5]
    cached.truncate(0)
    check(feed(inputs, cached, CHUNKS, causal=True), inputs.truth(backward=False))


def test_new_lengths_outside_of_the_rows_count_as_the_nearest_end(monkeypatch):
    """On a GPU nobody looks at them."""
    inputs = BASE.make()
    cached = make("unseen", inputs, 30, monkeypatch)
    cached.append(inputs.k, inputs.v, new_lengths=torch.tensor([-3, 2**40]))
    assert cached.lengths.tolist() == [0, 22]


def test_padding_is_cut_with_the_rows_it_hides():
    inputs = BASE.make()
    cached = make("contiguous", inputs, 22)
    cached.pad_left(torch.tensor([4, 1]))
    cached.append(inputs.k, inputs.v)
    cached.truncate(3)
    assert (cached.starts.tolist(), cached.lengths.tolist()) == ([3, 1], [3, 3])


def test_the_host_counts_what_it_cannot_see(monkeypatch):
    """On a GPU a tensor's truncation is not read back, an int's is known."""
    inputs = BASE.make()
    cached = make("unseen", inputs, 30, monkeypatch)
    cached.append(inputs.k, inputs.v)
    cached.truncate(torch.tensor([3, 7]))
    assert cached.bound == 22
    with pytest.raises(ValueError, match=r"capacity of 30, and a member would hold up to 44 rows"):
        cached.append(inputs.k, inputs.v)
    cached.truncate(7)
    assert cached.bound == 7
    cached.append(inputs.k, inputs.v)
    assert cached.lengths.tolist() == [25, 29]


def test_a_graph_that_is_captured_sees_every_slot_and_the_host_counts_no_more(monkeypatch):
    """It will be run again and again, with lengths that grow."""
    inputs = BASE.make()
    cached = make("unseen", inputs, 600, monkeypatch)
    cached.append(inputs.k, inputs.v)
    assert cached.keys_of(range(2))[0].shape[2] == 256
    with monkeypatch.context() as patch:
        patch.setattr(host, "capturing", lambda device: True)
        cached.append(inputs.k[:, :, :1], inputs.v[:, :, :1])
        assert cached.keys_of(range(2))[0].shape[2] == 600
    assert (cached.bound, cached.keys_of(range(2))[0].shape[2]) == (600, 600)
    cached.truncate(3)
    assert cached.bound == 600


def test_a_graph_that_is_captured_turns_every_token_it_may_ever_meet(monkeypatch):
    """Tables as long as the capacity, for the first capture begins before the append that ends the count; and none is remembered."""
    inputs, rotary, made = BASE.make(), Rotary(base=543.0), []
    tables = Rotary.tables
    monkeypatch.setattr(Rotary, "tables", lambda *given, **options: made.append(given[1]) or tables(*given, **options))
    cached = make("unseen", inputs, 600, monkeypatch)
    cached.append(inputs.k, inputs.v)
    last = {name: getattr(inputs, name)[:, :, :1] for name in "qkv"}
    with monkeypatch.context() as patch:
        patch.setattr(host, "capturing", lambda device: True)
        with pytest.raises(ValueError, match="cos has 599 positions, and a row can come to stand at 599"):
            attention_with_cache(last["q"], cached, k=last["k"], v=last["v"], rotary=tuple(tables(rotary, 599, 16)))
        attention_with_cache(last["q"], cached, k=last["k"], v=last["v"], rotary=rotary)
        assert made == [1024]
    for _ in range(2):
        attention_with_cache(last["q"], cached, k=last["k"], v=last["v"], rotary=rotary)
    assert made == [1024, 1024], "one recorded by the graph, one remembered"


def test_tables_need_the_rows_of_the_members_that_are_computed(monkeypatch):
    """A paged cache counts for each, though the lengths on the device are not seen."""
    inputs = BASE.make()
    cached, tables = make("pages of 5", inputs, 22), tuple(Rotary().tables(3, 16))
    monkeypatch.setattr(host, "seen_values", lambda tensor: None)
    cached.append(inputs.k[1:], inputs.v[1:], members=[1])
    q, k, v = (getattr(inputs, name)[:1, :, :3] for name in "qkv")
    attention_with_cache(q, cached, k=k, v=v, members=[0], rotary=tables)
    with pytest.raises(ValueError, match="cos has 3 positions, and a row can come to stand at 5"):
        attention_with_cache(q, cached, k=k, v=v, members=[0], rotary=tables)


def test_padding_of_a_member_stays_when_others_are_truncated():
    """Also before it is filled."""
    cached = make("pages of 5", BASE.make(), 22)
    cached.pad_left(torch.tensor([3, 2]))
    cached.free(0)
    assert cached.starts.tolist() == [0, 2]
    cached.pad_left(torch.tensor([6], dtype=torch.int32), [0])
    cached.truncate(0, [1])
    assert cached.starts.tolist() == [6, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_a_batch_too(kind, monkeypatch):
    """A serving loop comes to it when all requests have ended."""
    inputs = BASE.make()
    cached = make(kind, inputs, 22, monkeypatch)
    none = {name: getattr(inputs, name)[:0] for name in "qkv"}
    if kind.startswith("pages"):
        assert attention_with_cache(none["q"], cached, k=none["k"], v=none["v"], members=[], rotary=Rotary()).shape == (0, 6, 22, 16)
        assert cached.lengths.tolist() == [0, 0]
    cached.reorder(torch.zeros(0, dtype=torch.int64))
    assert cached.batch == cached.bound == 0
    cached.pad_left(torch.zeros(0, dtype=torch.int32))
    for rows in (slice(22), slice(1)):
        q, k, v = (none[name][:, :, rows] for name in "qkv")
        assert attention_with_cache(q, cached, k=k, v=v, causal=True, rotary=Rotary()).shape == (0, 6, k.shape[2], 16)
    cached.truncate(0)
    assert cached.lengths.shape == (0,)


def test_rows_past_the_capacity_are_dropped_where_the_host_counts_no_more(monkeypatch):
    """After the capture of a graph; nothing is written elsewhere, and the rows that fit are there."""
    inputs = BASE.make()
    cached = make("unseen", inputs, 25, monkeypatch)
    cached._counted = None
    cached.append(inputs.k[:, :, :20], inputs.v[:, :, :20], new_lengths=torch.tensor([20, 6]))
    cached.append(inputs.k, inputs.v)
    assert cached.lengths.tolist() == [25, 25]
    assert torch.equal(cached.k[0, :, 20:], inputs.k[0, :, :5])
    assert torch.equal(cached.v[1, :, 6:], inputs.v[1, :, :19])
    assert cached.bound == 25


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_and_the_steps_after_them(kind, monkeypatch):
    """new_lengths: rows past a member's own are dropped, wherever that member stands, and its next token follows the last real one."""
    inputs = Case("ragged", batch=3, heads=6, kv_heads=3, seqlen_q=9, seqlen_k=9, head_dim=16, causal=True).make()
    cached = make(kind, inputs, 20, monkeypatch)
    lengths = torch.tensor([4, 9, 0])
    first = attention_with_cache(inputs.q, cached, k=inputs.k, v=inputs.v, new_lengths=lengths, causal=True)
    second = attention_with_cache(inputs.q, cached, k=inputs.k, v=inputs.v, new_lengths=torch.tensor([0, 1, 3]), causal=True)
    step = attention_with_cache(inputs.q[:, :, :1], cached, k=inputs.k[:, :, :1], v=inputs.v[:, :, :1], causal=True)
    assert cached.lengths.tolist() == [5, 11, 4]
    for member, runs in enumerate(((4, 0, 1), (9, 1, 1), (0, 3, 1))):
        rows = torch.cat([torch.arange(run) for run in runs])
        alone = inputs.changed(**{name: getattr(inputs, name)[member : member + 1, :, rows] for name in "qkv"})
        outs = [out[member : member + 1, :, :run] for out, run in zip((first, second, step), runs, strict=True)]
        check(torch.cat(outs, 2), alone.truth(backward=False))
