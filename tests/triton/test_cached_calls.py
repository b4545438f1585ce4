"""A token decoded with a cache by the Triton kernels gets what it gets in the whole forward."""

from __future__ import annotations

import os

import pytest
import torch
from fused_attention.triton_kernels import decode, launch

from fused_attention import KVCache, PagedKVCache, attention_with_cache, host
from fused_attention.testing import Case, check

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
CASE = Case(
    "cached", heads=2, kv_heads=1, seqlen_q=20, seqlen_k=20, head_dim=16, head_dim_v=8, causal=True, window=(7, None),
    softcap=2.0, sinks=True, alibi_slopes="h",
)  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    found = []
    submit = launch.submit

    def record(kernel, grid, arguments, options):
        found.append(kernel.__name__)
        submit(kernel, grid, arguments, options)

    monkeypatch.setattr(launch, "submit", record)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_rows_of_the_whole_forward(dtype, launched, monkeypatch):
    """Chunks of more rows than a tile take the forward kernel, the others split their keys. The host sees no length, as on a GPU."""
    monkeypatch.setattr(host, "seen_values", lambda tensor: None)
    monkeypatch.setattr(decode, "SPLIT", 16)
    inputs = CASE.make(dtype=dtype)
    facts = {"kv_heads": 1, "head_dim": 16, "head_dim_v": 8, "dtype": dtype}
    into = KVCache(2, 40, **facts) if dtype is torch.bfloat16 else PagedKVCache(2, 8, page_size=5, **facts)
    for x in (into.k, into.v):
        x.fill_(torch.nan)
    into.pad_left(torch.tensor([0, 5]))
    outs = []
    for first, last in ((0, 17), (17, 18), (18, 20)):
        q, k, v = (x[:, :, first:last] for x in (inputs.q, inputs.k, inputs.v))
        outs.append(attention_with_cache(q, into, k=k, v=v, backend="triton", **inputs.options))
    check(torch.cat(outs, 2), inputs.changed(options={"kv_lengths": torch.tensor([[0, 20], [5, 20]])}).truth(backward=False))
    assert set(launched) == {"forward_kernel", "split_kernel", "combine_kernel"}
