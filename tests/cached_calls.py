"""Caches of every kind, and a sequence fed to one in chunks: what the tests of caches share."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fused_attention import KVCache, PagedKVCache, attention_with_cache, host
from fused_attention.testing import Inputs

KINDS = ("contiguous", "unseen", "pages of 1", "pages of 5", "pages of 16")


def make(kind: str, inputs: Inputs, slots: int, monkeypatch: Any = None) -> KVCache | PagedKVCache:
    """An empty cache that suits the inputs, whose memory holds NaN. "unseen": the host sees no length, as on a GPU."""
    batch, kv_heads, _, head_dim = inputs.k.shape
    facts = {"head_dim_v": inputs.v.shape[-1], "dtype": inputs.k.dtype}
    made: KVCache | PagedKVCache
    if kind.startswith("pages"):
        size = int(kind.split()[-1])
        made = PagedKVCache(batch, batch * -(-slots // size), kv_heads, head_dim, page_size=size, **facts)
    else:
        made = KVCache(batch, slots, kv_heads, head_dim, **facts)
    if kind == "unseen":
        monkeypatch.setattr(host, "seen_values", lambda tensor: None)
    for x in (made._k, made._v):
        x.fill_(torch.nan)
    return made


def feed(inputs: Inputs, into: KVCache | PagedKVCache, chunks: tuple[int, ...], **options: Any) -> Tensor:
    """The outputs of all queries, of which there are as many as keys: so many tokens a call."""
    ends = (0, *accumulate(chunks))
    parts = [
        attention_with_cache(inputs.q[:, :, a:b], into, k=inputs.k[:, :, a:b], v=inputs.v[:, :, a:b], **options) for a, b in pairwise(ends)
    ]
    return torch.cat(parts, 2)
