"""Problems of several tiles for the simulated GPU, and what a correct kernel makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import attention, attention_with_lse, cuda_backend, cuda_pages, validation
from fused_attention.testing import CASES, Case, check

SPLIT = Case("split-groups", batch=2, heads=4, kv_heads=2, seqlen_q=9, seqlen_k=520, head_dim=40, causal=True)
# With remainders, full tiles, and tiles that no row sees, for each width of a tile, with options and without.
LONG = (
    Case("long-40", batch=1, heads=2, kv_heads=1, seqlen_q=150, seqlen_k=201, head_dim=40, causal=True),
    Case("long-64-all", batch=1, heads=1, seqlen_q=129, seqlen_k=192, head_dim=64),
    Case("long-96", batch=1, heads=2, kv_heads=1, seqlen_q=140, seqlen_k=99, head_dim=96, causal=True),
    Case("long-128-window", batch=1, heads=1, seqlen_q=131, seqlen_k=161, head_dim=128, window=(40, 3)),
    Case("long-256", batch=1, heads=1, seqlen_q=67, seqlen_k=75, head_dim=256, causal=True),
    Case("long-200-64", batch=1, heads=1, seqlen_q=65, seqlen_k=50, head_dim=200, head_dim_v=64, kv_lengths=((3, 47),)),
    Case("long-33-everything", batch=1, heads=2, kv_heads=1, seqlen_q=70, seqlen_k=139, head_dim=33, head_dim_v=65, causal=True,
         window=(70, None), mask="1hqk", bias="b1qk", hiding_bias=True, alibi_slopes="h", softcap=3.0, sinks=True, dropout_p=0.25),
    Case("long-130-dropout", batch=1, heads=1, seqlen_q=66, seqlen_k=70, head_dim=130, dropout_p=0.4, sinks=True),
    Case("long-packed", lengths_q=(70, 0, 131, 1), lengths_k=(75, 3, 130, 64), heads=2, kv_heads=1, head_dim=64, causal=True),
    Case("long-packed-slopes", lengths_q=(70, 0, 131, 1), lengths_k=(75, 3, 130, 64), heads=2, head_dim=64, alibi_slopes="bh"),
    Case("long-bias", batch=2, heads=2, kv_heads=1, seqlen_q=70, seqlen_k=130, head_dim=24, bias="11qk", causal=True, dropout_p=0.2),
    Case("long-bias-of-keys", batch=2, heads=2, seqlen_q=70, seqlen_k=66, head_dim=72, bias="b11k", hiding_bias=True, softcap=2.0),
    Case("long-bias-of-queries", batch=1, heads=2, seqlen_q=66, seqlen_k=70, head_dim=136, bias="1hq1", mask="1hqk"),
    Case("split", batch=2, heads=2, seqlen_q=1, seqlen_k=300, head_dim=64),
    Case("split-window", batch=1, heads=2, seqlen_q=3, seqlen_k=341, head_dim=72, head_dim_v=40, causal=True, window=(280, None)),
    SPLIT,
    Case("split-256", batch=1, heads=2, kv_heads=1, seqlen_q=2, seqlen_k=270, head_dim=200, kv_lengths=((3, 266),), sinks=True),
    Case("split-everything", batch=2, heads=4, kv_heads=2, seqlen_q=5, seqlen_k=290, head_dim=33, mask="1hqk", bias="b1qk",
         hiding_bias=True, alibi_slopes="bh", softcap=3.0, sinks=True, kv_lengths=(0, 290)),
    Case("long-groups", batch=2, heads=6, kv_heads=3, seqlen_q=3, seqlen_k=65, head_dim=16),
)  # fmt: skip
SHARED = tuple(case for case in CASES if case.dtype is torch.float32)
ALONE = tuple(case for case in SHARED if "+" not in case.name)
SHORT = (torch.arange(40) < 35)[None, None, None]
FEW = ALONE[::3]
QUERIES = cuda_backend.FEW_QUERIES + 1  # too many for blocks to share their keys
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of a case, within their bounds."""
    inputs = case.make(dtype=dtype)
    output = inputs.run("cuda")
    try:
        check(output, inputs.truth())
    except AssertionError as error:
        raise AssertionError(f"{case.name} in {dtype}: {error}") from error
    return output


def run_with_broken_values(dtype: torch.dtype, value: float, case: Case = LONG[0], key: int = 90, **options: Any) -> None:
    """A value that is not finite reaches exactly the rows that see it, and no finite key of theirs; alone, and with its key."""
    inputs = replace(case, **options).make(dtype=dtype)
    first = key - (inputs.k.shape[2] - inputs.q.shape[2])  # the first query that sees it
    clean = inputs.run("cuda")
    v, k = inputs.v.clone(), inputs.k.clone()
    v[:, :, key, 5] = value
    k[:, :, key] = value
    for changed in (inputs.changed(v=v), inputs.changed(v=v, k=k)):
        output = changed.run("cuda")
        for name in ("out", "lse", "dq"):
            if not torch.equal(output[name][:, :, :first], clean[name][:, :, :first]):
                raise AssertionError(f"{name} of rows that do not see {value} is not what it is without it")
        if output["out"][:, :, first:, 5].isfinite().any():
            raise AssertionError(f"rows that see {value} are finite")


def run_with_a_broken_key_in_a_window(dtype: torch.dtype) -> None:
    """The rows that see a key of nan are nan, and keys that none of them sees have the gradients of the others."""
    inputs = Case("window", batch=1, heads=1, seqlen_q=64, seqlen_k=64, head_dim=64, causal=True, window=(4, None)).make(dtype=dtype)
    k = inputs.k.clone()
    k[:, :, 10] = math.nan  # seen by rows 10 to 14, which see keys 6 to 14
    output = inputs.changed(k=k).run("cuda")
    for name, first, last in (("out", 10, 15), ("dq", 10, 15), ("dk", 6, 15), ("dv", 6, 15)):
        broken = output[name].isnan().any(dim=-1)[0, 0].nonzero()[:, 0].tolist()
        if broken != list(range(first, last)):
            raise AssertionError(f"{name} has nan in rows {broken}, expected {first} to {last - 1}")


def run_with_broken_keys_that_nobody_sees(dtype: torch.dtype, **options: Any) -> None:
    """Hidden keys of nan, beside queries that do not fill their tile, change nothing."""
    inputs = Case("hidden", batch=1, heads=1, seqlen_q=40, seqlen_k=40, head_dim=64).make(dtype=dtype).changed(options=options)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 35:], v[:, :, 35:] = math.nan, math.nan
    clean = inputs.run("cuda")
    for name, tensor in inputs.changed(k=k, v=v).run("cuda").items():
        if not torch.equal(tensor, clean[name]):
            raise AssertionError(f"{name} is not what it is with other values in hidden keys")


def run_with_equal_scores(dtype: torch.dtype) -> None:
    """With all scores alike lse is that score + log(keys), however many tiles they fill: rescaling by 1 rounds nothing."""
    lses = {}
    for keys in (64, 2048):
        q, k = torch.full((1, 1, QUERIES, 64), 5.5, dtype=dtype), torch.full((1, 1, keys, 64), 7.25, dtype=dtype)
        lses[keys] = attention_with_lse(q, k, torch.ones_like(k), scale=0.11, backend="cuda").lse
    error = (lses[2048] - lses[64] - math.log(2048 / 64)).abs().max().item()
    if error > 4 * 2.0**-24 * lses[2048].max().item():
        raise AssertionError(f"lse is off by {error} after 32 tiles of equal scores")


def run_pages(dtype: torch.dtype) -> None:
    """Keys in pages, of a table that names pages there are not, give the bits of keys in a row."""
    inputs = SPLIT.make(dtype=dtype)
    for page_size in (7, 32):
        pages = -(-inputs.k.shape[2] // page_size)
        table = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(1)).view(2, pages).to(torch.int32)
        stores = []
        for rows in (inputs.k, inputs.v):
            store = torch.full((2 * pages, rows.shape[1], page_size, rows.shape[3]), math.nan, dtype=dtype)
            padded = torch.nn.functional.pad(rows, (0, 0, 0, pages * page_size - rows.shape[2]), value=math.nan)
            store[table.flatten()] = padded.unflatten(2, (pages, page_size)).movedim(2, 1).flatten(0, 1)
            stores.append(store)
        wild = torch.where(table == 2 * pages - 1, 2**31 - 1, table)
        wild = torch.where(wild == 0, -(2**31), wild)
        lengths = torch.tensor([inputs.k.shape[2] - 40, inputs.k.shape[2]])
        options = dict(inputs.options, kv_lengths=lengths)
        problem = validation.check(inputs.q, *(inputs.k, inputs.v), **options)
        got = cuda_pages.attend(inputs.q, *stores, wild, problem)
        expected = attention(inputs.q, inputs.k, inputs.v, **options, backend="cuda")
        if got is None or not torch.equal(got, expected):
            raise AssertionError(f"keys in pages of {page_size} do not give the bits of keys in a row")


def run_everything_once(dtype: torch.dtype) -> None:
    """What a fault in the kernels has to fail, in one type."""
    for case in LONG:
        run(case, dtype)
    run_with_broken_values(dtype, math.nan)
    run_with_broken_values(dtype, math.inf, softcap=3.0)
    run_with_a_broken_key_in_a_window(dtype)
    run_with_equal_scores(dtype)
    run_with_broken_keys_that_nobody_sees(dtype, causal=True, offset=-5)
    run_with_broken_keys_that_nobody_sees(dtype, mask=SHORT)
    for value in (math.nan, math.inf):
        run_with_broken_values(dtype, value, SPLIT, 515)
    run_pages(dtype)
    for case in ALONE:
        run(case, dtype)
