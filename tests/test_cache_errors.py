"""What a cache refuses is said in a sentence, and leaves it as it was."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fused_attention import KVCache, PagedKVCache, Rotary, attention_with_cache

X, Q = torch.ones(2, 2, 3, 8), torch.ones(2, 4, 3, 8)


def contiguous():
    return KVCache(2, 5, 2, 8)


def paged():
    return PagedKVCache(2, 3, 2, 8, page_size=2)


BOTH = {"contiguous": contiguous, "paged": paged}
CONSTRUCTORS = {
    "batch is 0, expected an int of at least 1": lambda: KVCache(0, 5, 2, 8),
    "capacity is 2.5, expected an int of at least 1": lambda: KVCache(2, 2.5, 2, 8),
    "kv_heads is True, expected an int of at least 1": lambda: KVCache(2, 5, True, 8),
    "head_dim_v is 0, expected an int of at least 1": lambda: PagedKVCache(2, 5, 2, 8, 0),
    "pages is -1, expected an int of at least 1": lambda: PagedKVCache(2, -1, 2, 8),
    "page_size is 0, expected an int of at least 1": lambda: PagedKVCache(2, 5, 2, 8, page_size=0),
    "dtype is torch.int32, expected float16, bfloat16, float32 or float64": lambda: KVCache(2, 5, 2, 8, dtype=torch.int32),
}
CALLS = {
    "k is torch.float16, the cache torch.float32: make the cache with dtype=torch.float16, or convert k": lambda c: c.append(X.half(), X),
    "k has shape (2, 1, 3, 8), expected (2, 2, new rows, head_dim 8 of k and 8 of v)": lambda c: c.append(X[:, :1], X),
    "v has shape (1, 2, 3, 8), expected (2, 2, new rows": lambda c: c.append(X, X[:1]),
    "k has 3 rows, v has 2: every new key needs its value": lambda c: c.append(X, X[:, :, 1:]),
    "v is a list, expected a torch.Tensor": lambda c: c.append(X, [X]),
    "k is on meta, the cache on cpu: make the cache with device='meta'": lambda c: c.append(X.to("meta"), X),
    "k requires a gradient, and caches are for inference": lambda c: c.append(X.clone().requires_grad_(), X),
    "lengths is -1, expected an int of at least 0": lambda c: c.truncate(-1),
    "padding has shape (3,), expected (2,): one for each member": lambda c: c.pad_left(torch.zeros(3, dtype=torch.int32)),
    "padding is torch.float32 of shape (2,) on cpu, expected an int32 or int64 tensor (2,)": lambda c: c.pad_left(torch.zeros(2)),
    "padding is a list, expected an int32 or int64 tensor (2,)": lambda c: c.pad_left([1, 2]),
    "q has shape (2, 3, 3, 8), expected (2, a multiple of kv_heads 2, seqlen_q, head_dim 8)": lambda c: attention_with_cache(Q[:, :3], c),
    "q has shape (1, 4, 3, 8), expected (2,": lambda c: attention_with_cache(Q[:1], c),
    "q has shape (), expected (2, a multiple of kv_heads 2": lambda c: attention_with_cache(torch.tensor(1.0), c),
    "q is torch.float64, the cache torch.float32": lambda c: attention_with_cache(Q.double(), c),
    "q requires a gradient, and caches are for inference: call": lambda c: attention_with_cache(Q.clone().requires_grad_(), c),
    "sinks requires a gradient, and caches": lambda c: attention_with_cache(Q, c, sinks=torch.ones(4, requires_grad=True)),
    "k is given and v is None: give both to append them, or neither": lambda c: attention_with_cache(Q, c, k=X),
    "v is given and k is None": lambda c: attention_with_cache(Q, c, v=X),
    "new_lengths is given with 3 queries and 0 new keys": lambda c: attention_with_cache(
        Q, c, new_lengths=torch.ones(2, dtype=torch.int32)
    ),
    "new_lengths is given with 2 queries and 3 new keys": lambda c: attention_with_cache(
        Q[:, :, 1:], c, k=X, v=X, new_lengths=torch.ones(2, dtype=torch.int32)
    ),
    "window left is -1, expected an int of at least 0": lambda c: attention_with_cache(Q, c, k=X, v=X, window=(-1, None)),
    "backend is 'none', expected one of": lambda c: attention_with_cache(Q, c, k=X, v=X, backend="none"),
    "rotary is a int, expected a Rotary, a pair of tables": lambda c: attention_with_cache(Q, c, k=X, v=X, rotary=1),
    "rotary turns 10 elements of a head_dim of 8": lambda c: attention_with_cache(Q, c, k=X, v=X, rotary=Rotary(dim=10)),
    "interleaved is True beside a Rotary": lambda c: attention_with_cache(Q, c, k=X, v=X, rotary=Rotary(), interleaved=True),
    "interleaved is True and rotary is None": lambda c: attention_with_cache(Q, c, k=X, v=X, interleaved=True),
    "cos requires a gradient, and caches are for inference": lambda c: attention_with_cache(
        Q, c, k=X, v=X, rotary=(torch.ones(9, 4, requires_grad=True), torch.ones(9, 4))
    ),
    "sin requires a gradient, and caches are for inference": lambda c: attention_with_cache(
        Q, c, k=X, v=X, rotary=(torch.ones(9, 4), torch.ones(9, 4, requires_grad=True))
    ),
    "causal is None, expected True or False": lambda c: attention_with_cache(Q, c, k=X, v=X, causal=None),
    "cos has 2 positions, and a row can come to stand at 2": lambda c: attention_with_cache(
        Q, c, k=X, v=X, rotary=(torch.ones(2, 4), torch.ones(2, 4))
    ),
}
ALONE = {
    "the cache has a capacity of 5, and a member would hold up to 6 rows with 3 more: make it with a larger capacity, or truncate it": (
        lambda c: (c.append(X, X), c.append(X, X)),
        contiguous,
        3,
    ),
    "members is for a PagedKVCache": (lambda c: attention_with_cache(Q, c, members=[0, 1]), contiguous, 0),
    "new_lengths is a list, expected an int32 or int64 tensor (2,)": (lambda c: c.append(X, X, new_lengths=[1, 2]), contiguous, 0),
    "index is a list, expected an int32 or int64 tensor (batch,) on cpu": (lambda c: c.reorder([0, 0]), contiguous, 0),
    "4 pages are needed for 6 new rows, and 3 of 3 are free: free or truncate members, or make the cache with more pages": (
        lambda c: c.append(X, X),
        paged,
        0,
    ),
    "there is no member 2: the cache has 2, the first is 0": (lambda c: c.append(X, X, members=[0, 2]), paged, 0),
    "there is no member True": (lambda c: c.free(True), paged, 0),
    "there is no member -1": (lambda c: c.reorder([0, -1]), paged, 0),
    "members is [1, 1], expected each only once": (lambda c: c.append(X, X, members=[1, 1]), paged, 0),
    "there is no member 7: the cache has 2": (lambda c: c.free(np.int64(7)), paged, 0),
    "there is no member 'a': the cache has 2": (lambda c: c.free("a"), paged, 0),
    "padding has shape (2,), expected (1,)": (lambda c: c.pad_left(torch.ones(2, dtype=torch.int32), [1]), paged, 0),
    "members is for a PagedKVCache: a KVCache": (lambda c: c.pad_left(torch.ones(1, dtype=torch.int32), [1]), contiguous, 0),
    "new_lengths has 3 entries, expected 2: one for each member": (lambda c: c.append(X, X, new_lengths=[0, 0, 0]), paged, 0),
    "new_lengths is -1, expected an int of at least 0": (lambda c: c.append(X, X, new_lengths=[0, -1]), paged, 0),
    "new_lengths is torch.float32 of shape (2,) on cpu, expected ints or an int tensor on the CPU": (
        lambda c: c.append(X, X, new_lengths=torch.ones(2)),
        paged,
        0,
    ),
    "length is 3, and member 0 holds 1 rows: fork at most these": (
        lambda c: (c.append(X, X, new_lengths=[1, 1]), c.fork(0, 1, 3)),
        paged,
        1,
    ),
    "member 1 holds 1 rows: free it before it becomes a fork of member 0": (
        lambda c: (c.append(X, X, new_lengths=[1, 1]), c.fork(0, 1)),
        paged,
        1,
    ),
}


@pytest.mark.parametrize("sentence", CONSTRUCTORS)
def test_a_cache_that_cannot_be(sentence):
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        CONSTRUCTORS[sentence]()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("sentence", CALLS)
def test_a_call_that_does_not_fit(sentence, kind):
    refused(CALLS[sentence], PagedKVCache(2, 8, 2, 8, page_size=2) if kind == "paged" else contiguous(), sentence, 0)


@pytest.mark.parametrize("sentence", ALONE)
def test_a_call_that_does_not_fit_this_kind(sentence):
    call, make, length = ALONE[sentence]
    refused(call, make(), sentence, length)


def refused(call, cache, sentence, length):
    for x in (cache.k, cache.v):
        x.zero_()
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        call(cache)
    assert cache.lengths.tolist() == [length] * 2
    assert cache.k.sum() == 2 * 2 * 8 * length, "nothing was written"


def test_ints_of_numpy_are_ints():
    cache = paged()
    cache.append(X, X, new_lengths=np.array([1, 2]), members=np.array([1, 0]))
    cache.reorder(np.array([0, 0]))
    assert cache.lengths.tolist() == [2, 2]


def test_members_cannot_go_on_from_nobody():
    for cache in (contiguous(), paged()):
        cache.reorder(torch.zeros(0, dtype=torch.int64))
        with pytest.raises(ValueError, match="no member"):
            cache.reorder(torch.zeros(2, dtype=torch.int64))


def test_no_cache_at_all():
    with pytest.raises(TypeError, match="cache is a Tensor, expected a KVCache or PagedKVCache"):
        attention_with_cache(Q, X)
