"""Keys read in pages: the bits of keys in a row, for every option and page size, and no page table leads anywhere else.

With sinks the bits are the same where both calls have one split, or both more: who adds the sink depends on that.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels import decode, tiles

from fused_attention import KVCache, PagedKVCache, attention_with_cache, explain
from fused_attention.testing import Case

from .far_apart import far_apart
from .memcheck import MemcheckError, memcheck
from .paged_calls import in_pages
from .test_memory_safety import hostile

GROUPS = {"batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 2, "seqlen_k": 50, "head_dim": 24, "head_dim_v": 17}
PAGED = {  # a case, and sizes of pages: parts of a tile of 16 keys, one, more that it divides, and more that it does not
    Case("grouped", **GROUPS, sinks=True, kv_lengths=((5, 45), (0, 33)), window=(30, None), causal=True): (7, 16),
    Case("pairs", **GROUPS, mask="bh1k", mask_block=16, bias="1hqk", dropout_p=0.3, alibi_slopes="bh", softcap=2.0): (1, 48),
    Case("strided", **GROUPS, layout="strided", kv_lengths=((3, 3), (7, 50))): (16, 20),
}


@pytest.fixture(autouse=True)
def everything_decodes(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.TileConfig(10**6, 16))


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_keys_in_pages_give_the_bits_of_keys_in_a_row(case):
    inputs = case.make()
    expected = inputs.run("triton", backward=False)["out"]
    for size in PAGED[case]:
        assert torch.equal(in_pages(inputs, size).out(), expected), f"pages of {size}"


@pytest.mark.parametrize("size", [5, 32])
def test_keys_in_pages_equal_the_oracle_in_float64(size):
    inputs = Case("float64", **GROUPS, kv_lengths=((5, 45), (0, 33)), softcap=3.0, alibi_slopes="h").make(dtype=torch.float64)
    torch.testing.assert_close(in_pages(inputs, size).out(), inputs.truth(backward=False).out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [7, 16])
def test_programs_that_read_pages_keep_to_their_memory(size, monkeypatch):
    """In splits of a tile each, some of them past every key; their pages are the ends of the memory that there is."""
    monkeypatch.setattr(decode, "SPLIT", 16)
    inputs = Case("late", **GROUPS, kv_lengths=((40, 50), (0, 3))).make()
    paged = in_pages(inputs, size)
    with memcheck(shuffle=1) as check:
        out = paged.out()
        check.results(out)
    torch.testing.assert_close(out, paged.out(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [7, 16])
def test_hostile_page_tables_lead_nowhere(size):
    random = np.random.default_rng(size)
    inputs = Case("hostile", batch=15, heads=1, seqlen_q=1, seqlen_k=20).make()
    paged = in_pages(inputs, size)
    legal, lengths = len(paged.k), hostile(random, (2,), torch.int32, 20)
    hard = paged._replace(
        k=paged.k.nan_to_num(nan=1.0),
        v=paged.v.nan_to_num(nan=1.0),
        table=hostile(random, (paged.table.shape[1],), torch.int32, legal),
        problem=paged.problem._replace(kv_lengths=lengths),
    )
    with memcheck() as check:
        out = hard.out()
        check.results(out)
    clamped = hard._replace(table=hard.table.clamp(0, legal - 1))
    assert torch.equal(out, clamped.out())
    assert out.isfinite().all()


def test_a_page_that_is_not_there_would_be_noticed(monkeypatch):
    """A kernel that is told of one page more clamps to it."""
    paged = in_pages(Case("hostile", batch=1, heads=1, seqlen_q=1, seqlen_k=35).make(), 16)
    paged.table[0, 1] = len(paged.k)
    monkeypatch.setattr(decode.paging, "pages", lambda table, k: decode.paging.Pages(table, *table.stride(), len(k) + 1))
    with pytest.raises(MemcheckError, match="out of bounds"), memcheck():
        paged.out()


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["page", "head", "slot", "dim"])
@pytest.mark.parametrize("size", [3, 16])
def test_pages_a_billion_elements_apart(axis, size):
    inputs = Case("near", batch=1, heads=3, seqlen_q=1, seqlen_k=9 if size == 3 else 35, head_dim=3).make(dtype=torch.float16)
    paged = in_pages(inputs, size)
    keep = slice(None) if axis else slice(3)
    k, v, table = paged.k[keep], paged.v[keep], paged.table
    if not axis:
        table = torch.tensor([[2, 1, 0, 0, 0]], dtype=torch.int32)
        k, v = k.nan_to_num(nan=1.0), v.nan_to_num(nan=1.0)
    near = paged._replace(k=k, v=v, table=table)
    far = near._replace(k=far_apart(k, axis), v=far_apart(v, axis), table=far_apart(table, axis % 2))
    assert torch.equal(far.out(), near.out())


def test_a_cache_in_pages_is_read_where_it_lies_with_the_bits_of_one_in_a_row(monkeypatch):
    """Members of unlike lengths, their pages between each other's, padding on the left, a shared prefix, and some members alone.

    With sinks, of which a cache in a row and one in pages have the same bits only while both are shown at most SPLIT keys, or both more.
    """
    monkeypatch.setattr(PagedKVCache, "keys_of", None)  # which copies
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.TileConfig(16, 16))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 90, width, generator=generator) for heads, width in ((4, 16), (2, 16), (2, 8)))
    k[2, :, :30], v[2, :, :30] = k[0, :, :30], v[0, :, :30]
    whole, paged = KVCache(3, 90, 2, 16, 8), PagedKVCache(3, 40, 2, 16, 8, page_size=5)
    for x in (whole.k, whole.v, paged.k, paged.v):
        x.fill_(torch.nan)
    paged.append(k[:2, :, :30], v[:2, :, :30], members=[0, 1])
    paged.fork(0, 2)
    lengths = (85, 30, 70)
    for member, length in enumerate(lengths):
        paged.append(k[member : member + 1, :, 30:length], v[member : member + 1, :, 30:length], members=[member])
    whole.append(k, v, new_lengths=torch.tensor(lengths))
    for cache in (whole, paged):
        cache.pad_left(torch.tensor([0, 7, 0]))
    options = {"causal": True, "window": (40, None), "softcap": 3.0, "sinks": torch.ones(4), "alibi_slopes": torch.rand(4)}
    expected = attention_with_cache(q[:, :, :2], whole, backend="triton", **options)
    assert torch.equal(attention_with_cache(q[:, :, :2], paged, backend="triton", **options), expected)
    some = attention_with_cache(q[[2, 0], :, :2], paged, backend="triton", members=[2, 0], **options)
    assert torch.equal(some, expected[[2, 0]])


def test_explain_says_whether_pages_are_copied(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.TileConfig(16, 16))
    cache = PagedKVCache(2, 6, 2, 16)
    for rows, copied in ((8, None), (9, "9 x 2 queries of a key head")):
        x, kv = torch.zeros(2, 4, rows, 16), torch.zeros(2, 2, rows, 16)
        found = explain(x, cache, k=kv, v=kv, causal=True, backend="triton")
        assert (found.copied is None) == (copied is None)
        assert (copied or "pages: read where they lie") in str(found)
