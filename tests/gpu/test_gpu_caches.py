"""Caches on the GPU: steps equal the whole forward, pages give the bits of a row, no number leads outside, and a graph decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import KVCache, PagedKVCache, Rotary, attention_with_cache, explain
from fused_attention.testing import Case, Inputs, check

from .margins import Margins
from .target import Target, at_size
from .test_gpu_streams import captured, no_synchronisation

TOKENS = 1031
BASE = Case("cached", heads=8, kv_heads=2, seqlen_q=TOKENS, seqlen_k=TOKENS, head_dim=64, causal=True, dtype=torch.bfloat16)
CASES = (
    BASE,
    replace(BASE, name="options", window=(300, None), softcap=20.0, sinks=True, alibi_slopes="h"),
    replace(BASE, name="wide", head_dim=128, head_dim_v=96, heads=16, kv_heads=1, dtype=torch.float16),
    replace(BASE, name="full", head_dim=80, heads=4, kv_heads=4, dtype=torch.float32),
)
PAGE_SIZES = (1, 5, 16, 64, 256)
MARGINS = (512, 513)


def contiguous(inputs: Inputs, capacity: int) -> KVCache:
    batch, kv_heads, _, head_dim = inputs.k.shape
    return KVCache(batch, capacity, kv_heads, head_dim, inputs.v.shape[-1], dtype=inputs.k.dtype, device=inputs.k.device)


def paged(inputs: Inputs, capacity: int, page_size: int) -> PagedKVCache:
    batch, kv_heads, _, head_dim = inputs.k.shape
    facts: dict[str, Any] = {"page_size": page_size, "dtype": inputs.k.dtype, "device": inputs.k.device}
    return PagedKVCache(batch, batch * (-(-capacity // page_size) + 1), kv_heads, head_dim, inputs.v.shape[-1], **facts)


def fill(cache: KVCache | PagedKVCache, inputs: Inputs) -> None:
    """The members' rows in turns, so that their pages lie between each other's, in memory that was NaN."""
    for x in (cache.k, cache.v):
        x.fill_(torch.nan)
    rows, seqlen = max(1, inputs.k.shape[2] // 4), inputs.k.shape[2]
    for first in range(0, seqlen, rows):
        cache.append(inputs.k[:, :, first : first + rows], inputs.v[:, :, first : first + rows])


@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES], ids=lambda size: f"pages-of-{size}" if size else "contiguous")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_equal_the_rows_of_the_whole_forward(
    case: Case, page_size: int | None, machine: Target, record_property: Callable[[str, object], None]
) -> None:
    """A prompt, two chunks and single tokens; slots that are not filled hold NaN."""
    inputs = at_size(case, machine).make(machine.device)
    seqlen = inputs.k.shape[2]
    cache = contiguous(inputs, seqlen + 9) if page_size is None else paged(inputs, seqlen, page_size)
    for x in (cache.k, cache.v):
        x.fill_(torch.nan)
    outs, edges = [], (0, seqlen - 20, seqlen - 6, seqlen - 2, seqlen - 1, seqlen)
    for first, last in pairwise(edges):
        q, k, v = (x[:, :, first:last] for x in (inputs.q, inputs.k, inputs.v))
        outs.append(attention_with_cache(q, cache, k=k, v=v, backend=machine.backend, **inputs.options))
    record_property("used", check(torch.cat(outs, 2), inputs.truth(backward=False)).used)
    assert cache.lengths.tolist() == [seqlen] * len(inputs.k)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keys_in_pages_give_the_bits_of_keys_in_a_row(case: Case, page_size: int, machine: Target) -> None:
    inputs = at_size(case, machine).make(machine.device)
    seqlen = inputs.k.shape[2]
    row, pages = contiguous(inputs, seqlen), paged(inputs, seqlen, page_size)
    for cache in (row, pages):
        fill(cache, inputs)
        cache.pad_left(torch.tensor([3, 0], device=machine.device))
    last, given = inputs.changed(q=inputs.q[:, :, -1:]), inputs.options | {"backend": machine.backend}
    expected, got = (attention_with_cache(last.q, cache, **given) for cache in (row, pages))
    copied = explain(last.q, pages, **given).copied
    assert copied is None or machine.rehearsed, copied
    check(got, last.changed(options={"kv_lengths": torch.tensor([[3, seqlen], [0, seqlen]], device=machine.device)}).truth(backward=False))
    if copied is None and case.dtype is not torch.float32:  # whose programs have other numbers of warps, and so sum in another order
        assert torch.equal(got, expected)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("page_size", [None, 5, 64])
def test_no_number_of_a_cache_leads_outside_of_it(page_size: int | None, margin: int, machine: Target) -> None:
    """NaN lies around the cache's memory and whatever it may hold in pages or lengths is legal: zeros, ends and nonsense."""
    inputs = at_size(BASE, machine).make(machine.device)
    seqlen = inputs.k.shape[2]
    cache = contiguous(inputs, seqlen) if page_size is None else paged(inputs, seqlen, page_size)
    cache.append(inputs.k, inputs.v)
    margins = Margins(machine.device, margin)
    for name, x in (("_k", cache.k), ("_v", cache.v)):
        setattr(cache, name, margins.copy(name, torch.randn_like(x)))
    if isinstance(cache, PagedKVCache):
        wild = torch.tensor([-1, 2**31 - 1, -(2**31), 7, 0, len(cache.k), 10**6], dtype=torch.int32)
        cache.page_table.copy_(wild.repeat(cache.page_table.numel())[: cache.page_table.numel()].view_as(cache.page_table))
    else:
        cache.ranges.copy_(torch.tensor([[-5, 2**31 - 1], [-(2**31), 10**6]], dtype=torch.int32))
    out = attention_with_cache(inputs.q[:, :, -1:], cache, backend=machine.backend, **inputs.options)
    assert out.isfinite().all(), "NaN from outside of the cache reached the result"
    assert not margins.damaged()


class Steps:
    """Decoding steps whose token lies in memory of its own, as a graph needs it."""

    def __init__(self, inputs: Inputs, cache: KVCache, backend: str) -> None:
        self.inputs, self.cache, self.backend = inputs, cache, backend
        self.q, self.k, self.v = (x[:, :, :1].clone() for x in (inputs.q, inputs.k, inputs.v))
        self.tables = tuple(Rotary().tables(cache.capacity, inputs.q.shape[-1], device=inputs.q.device))

    def load(self, token: int) -> None:
        for mine, x in ((self.q, self.inputs.q), (self.k, self.inputs.k), (self.v, self.inputs.v)):
            mine.copy_(x[:, :, token : token + 1])

    def __call__(self) -> dict[str, Tensor]:
        given = {"k": self.k, "v": self.v, "rotary": self.tables, "causal": True, "backend": self.backend}
        return {"out": attention_with_cache(self.q, self.cache, **given)}


def test_a_graph_decodes_what_calls_do(gpu: Target) -> None:
    """One graph of a step, which appends its token and attends, replayed from an empty cache past several splits of the keys."""
    inputs = BASE.make(gpu.device)
    eager, replays = (Steps(inputs, contiguous(inputs, TOKENS), gpu.backend) for _ in range(2))
    graph, results = captured(replays)
    replays.cache.truncate(0)
    for token in range(TOKENS):
        eager.load(token)
        replays.load(token)
        graph.replay()
        if token % 97 == 0 or token > TOKENS - 3:
            assert torch.equal(results["out"], eager()["out"]), f"token {token}"
        else:
            eager()
    assert torch.equal(replays.cache.lengths, eager.cache.lengths)
    graph.replay()  # past the capacity: dropped on the device
    assert replays.cache.lengths.tolist() == [TOKENS] * len(inputs.k)


def test_a_graph_reads_pages_that_the_host_fills_between(gpu: Target) -> None:
    """The append stays outside; the graph reads the page table and the lengths as they are at each replay."""
    inputs = BASE.make(gpu.device)
    cache, q = paged(inputs, TOKENS, 16), inputs.q[:, :, :1].clone()
    cache.append(inputs.k[:, :, :600], inputs.v[:, :, :600])
    graph, results = captured(lambda: {"out": attention_with_cache(q, cache, backend=gpu.backend)})
    cache.append(inputs.k[:, :, 600:700], inputs.v[:, :, 600:700])  # as many keys are shown as before: 768
    q.copy_(inputs.q[:, :, 700:701])
    graph.replay()
    assert torch.equal(results["out"], attention_with_cache(q, cache, backend=gpu.backend))


def test_a_step_never_waits_for_the_device(gpu: Target) -> None:
    inputs = BASE.make(gpu.device)
    steps = Steps(inputs, contiguous(inputs, TOKENS), gpu.backend)
    steps()
    with no_synchronisation():
        steps()
        steps.cache.reorder(torch.zeros(2, dtype=torch.int64, device=gpu.device))
        steps.cache.truncate(1)
