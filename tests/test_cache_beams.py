"""Beams read the memory of their source where it is: one copy of it, whatever their number, and each key once for all of them."""

from __future__ import annotations

import pytest
import torch

from fused_attention import Rotary, attention_with_cache, backends, explain
from fused_attention.models.caches import Caches
from fused_attention.testing import Case, check

from .cached_calls import KINDS, make

RUNNABLE = [name for name, reason in backends().items() if reason is None]
CASE = Case("memory", batch=2, heads=4, kv_heads=2, seqlen_q=6, seqlen_k=37, head_dim=16, kv_lengths=(37, 21), softcap=3.0, sinks=True)


def memory(kind, inputs, monkeypatch):
    cache = make(kind, inputs, 40, monkeypatch)
    cache.append(inputs.k, inputs.v, new_lengths=inputs.options["kv_lengths"])
    return cache


def options_of(inputs):
    return {name: inputs.options[name] for name in ("softcap", "sinks")}


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [2, 3, 6])
def test_beams_see_the_memory_of_their_member(kind, backend, beams, monkeypatch):
    inputs = CASE.make()
    cache, rows = memory(kind, inputs, monkeypatch), inputs.q.unflatten(2, (beams, -1))
    q = rows.transpose(1, 2).flatten(0, 1)  # (batch * beams, heads, rows of a beam, head_dim)
    out = attention_with_cache(q, cache, backend=backend, **options_of(inputs))
    assert out.shape == q.shape
    check(out.unflatten(0, (2, beams)).transpose(1, 2).flatten(2, 3), inputs.truth(backward=False))
    assert cache.batch == 2
    assert explain(q, cache, backend=backend).backend == backend


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (3, None)}, {"alibi_slopes": torch.ones(4)}, {"rotary": Rotary()}, {"k": 1}],
    ids=lambda options: next(iter(options)),
)
def test_beams_stand_nowhere(options):
    """A row's distance to a key would be that of a longer chunk."""
    inputs = CASE.make()
    cache, q = memory("contiguous", inputs, None), inputs.q[:, :, :1].repeat_interleave(2, 0)
    given = {"k": inputs.k[:, :, :1], "v": inputs.v[:, :, :1]} if "k" in options else options
    expected = rf"q has shape \(4, 4, 1, 16\), expected \(2, a multiple of kv_heads 2, .* is for calls without {next(iter(options))}$"
    with pytest.raises(ValueError, match=expected):
        attention_with_cache(q, cache, **given)


def test_a_batch_of_no_beams_is_told_what_would_be():
    inputs = CASE.make()
    cache, q = memory("contiguous", inputs, None), inputs.q.repeat_interleave(2, 0)
    with pytest.raises(ValueError, match=r"q has shape \(3, 4, 6, 16\), expected \(2, .*; or a multiple of 2 in place of it, beams"):
        attention_with_cache(q[:3], cache)
    with pytest.raises(ValueError, match=r"expected \(2, a multiple of kv_heads 2, seqlen_q, head_dim 16\) as the cache was made for$"):
        attention_with_cache(inputs.q[..., :8], cache)  # beams are no matter


@pytest.mark.parametrize("window", [(None, None), [None, None]])
def test_a_window_that_hides_nothing_counts_no_positions(window):
    inputs = CASE.make()
    cache, q = memory("contiguous", inputs, None), inputs.q.repeat_interleave(2, 0)
    assert torch.equal(attention_with_cache(q, cache, window=window), attention_with_cache(q, cache))


@pytest.mark.parametrize("kind", ["contiguous", "pages of 5"])
def test_repeated_caches_keep_one_memory(kind):
    inputs = CASE.make()
    caches = Caches([memory(kind, inputs, None)], [memory(kind, inputs, None)])
    held = caches.memory[0].k.data_ptr()
    caches.repeat(3)
    caches.reorder(torch.tensor([2, 0, 1, 5, 5, 3]))
    assert [cache.batch for cache in (*caches.text, *caches.memory)] == [6, 2]
    assert caches.memory[0].k.data_ptr() == held
