"""Pages are read where they lie, copied where they must be, and no number in a cache's tensors leads outside of its memory."""

from __future__ import annotations

import pytest
import torch

from fused_attention import KVCache, PagedKVCache, attention_with_cache, backends, explain

RUNNABLE = [name for name, reason in backends().items() if reason is None]
MISSING = backends()["cpu"]
HOSTILE = torch.tensor([-(2**31), -9, -1, 0, 1, 5, 6, 35, 2**31 - 1], dtype=torch.int32)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_hostile_numbers_in_a_paged_cache(backend):
    """The kernels against unreadable memory: tests/sanitize. Here they, and the copies for other backends, give numbers of the cache."""
    members = len(HOSTILE)
    cache = PagedKVCache(members, 30, 1, 16, page_size=3)
    cache.append(torch.ones(members, 1, 3, 16), torch.ones(members, 1, 3, 16))
    for x in (cache.k, cache.v):
        x.fill_(1.0)
    cache.page_table.copy_(HOSTILE.repeat(members, 4)[:, :30])
    for starts in (HOSTILE.roll(4), torch.zeros_like(HOSTILE)):
        cache.ranges.copy_(torch.stack([starts, HOSTILE], 1))
        for queries in (1, 20):
            out = attention_with_cache(torch.ones(members, 2, queries, 16), cache, backend=backend)
            seen = out[:, :1, :1, :1].round()
            assert ((seen == 0) | (seen == 1)).all()
            torch.testing.assert_close(out, seen.expand_as(out))


def test_hostile_numbers_in_a_cache():
    """Wherever they lead, rows go to the cache's own memory, and it stays usable."""
    members = len(HOSTILE)
    cache, rows = KVCache(members, 6, 2, 16), torch.ones(members, 2, 3, 16)
    for starts in (HOSTILE, HOSTILE.roll(3)):
        for x in (cache._k, cache._v):
            x.fill_(1.0)
        cache.ranges.copy_(torch.stack([starts, HOSTILE], 1))
        cache._scatter(rows, rows)  # as on a GPU, where nobody sees the lengths
        assert attention_with_cache(rows, cache, causal=True).isfinite().all()
        cache.truncate(starts)
        cache.reorder(HOSTILE)
        cache.truncate(0)
        cache.append(rows, rows)
        assert cache.lengths.tolist() == [3] * members


@pytest.fixture
def copies(monkeypatch):
    """How often pages were copied."""
    found = []
    copy = PagedKVCache.keys_of
    monkeypatch.setattr(PagedKVCache, "keys_of", lambda cache, chosen: found.append(chosen) or copy(cache, chosen))
    return found


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 16, 300])
def test_pages_are_read_where_they_lie_with_the_bits_of_contiguous_keys(size, dtype, copies):
    """Tiles of keys are the same wherever rows lie. 1100 keys: two ranges that are merged."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, 32, generator=generator).to(dtype)  # two rows fit the kernel of the shortest vectors
    k, v = (torch.randn(3, 2, 1100, width, generator=generator).to(dtype) for width in (32, 48))
    whole = KVCache(3, 1100, 2, 32, 48, dtype=dtype)
    paged = PagedKVCache(3, 2400 // size + 3, 2, 32, 48, page_size=size, dtype=dtype)
    for start, stop in ((0, 150), (150, 1100)):  # so that the pages of members lie between each other's
        for member, most in enumerate((1100, 40, 1063)):
            rows = slice(start, max(start, min(stop, most)))
            paged.append(k[member : member + 1, :, rows], v[member : member + 1, :, rows], members=[member])
    whole.append(k, v, new_lengths=torch.tensor([1100, 40, 1063]))
    for cache in (whole, paged):
        cache.pad_left(torch.tensor([0, 7, 0]))
    for options in ({}, {"causal": True, "window": (300, None), "softcap": 3.0, "sinks": torch.ones(4), "alibi_slopes": torch.rand(4)}):
        expected = attention_with_cache(q, whole, backend="cpu", **options)
        assert torch.equal(attention_with_cache(q, paged, backend="cpu", **options), expected)
        some = attention_with_cache(q[[2, 0]], paged, backend="cpu", members=[2, 0], **options)
        assert torch.equal(some, expected[[2, 0]])
    assert not copies


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_many_queries_and_whoever_listens_copy_the_pages(copies):
    cache, x = PagedKVCache(1, 10, 1, 16), torch.randn(1, 1, 30, 16)
    assert "copied first, for 30 x 1 queries of a key head are more than the cpu" in str(explain(x, cache, k=x, v=x, causal=True))
    attention_with_cache(x, cache, k=x, v=x, causal=True)
    assert len(copies) == 1
    plain = attention_with_cache(x[:, :, :1], cache)
    assert len(copies) == 1
    assert str(explain(x[:, :, :1], cache)).endswith("pages: read where they lie")
    assert "for the torch backend reads keys in a row" in str(explain(x[:, :, :1], cache, backend="torch"))
    with torch.autograd.profiler.profile() as heard:
        assert explain(x[:, :, :1], cache).copied == "somebody listens to the call: a compiler, a profiler, a transform or a mode"
        assert torch.equal(attention_with_cache(x[:, :, :1], cache), plain)
    assert any("fused_attention::forward" in event.name for event in heard.function_events)


def test_rows_of_no_whole_vectors_are_copied(copies):
    cache, x = PagedKVCache(1, 3, 1, 9), torch.randn(1, 1, 1, 9)
    cache.append(x, x)
    torch.testing.assert_close(attention_with_cache(x, cache, backend="cpu"), x)
    assert len(copies) == 1
    expected = "head_dim 9 and head_dim_v 9 do not suit the cpu backend's kernel for pages"
    assert explain(x, cache, backend="cpu").copied == expected
