"""A step of decoding on a GPU with keys in a row and in pages: bytes of keys and values a second, as a share of what a copy reaches.

bytes of a step = batch kv_heads keys (head_dim + head_dim_v) itemsize        share = bytes a second / those a copy reads and writes
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import KVCache, PagedKVCache, attention_with_cache
from fused_attention.testing import Case, Inputs, measure

from .timing import Protocol
from .workloads import DTYPES

COPY = "copy"


@dataclass(frozen=True)
class Decoding:
    """A token of `batch` sequences that have `keys` tokens each."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    page_sizes: tuple[int, ...] = (16, 256)
    judged: int = 1  # members that are held against float64

    def case(self, dtype: torch.dtype) -> Case:
        shape = {"batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return Case(self.name, **shape, seqlen_q=1, seqlen_k=self.keys, dtype=dtype)


DECODINGS = (
    Decoding("decoding-16x8k", 16, 64, 8, 8192, 128),
    Decoding("decoding-64x2k", 64, 32, 8, 2048, 128),
    Decoding("decoding-8x4k-mha", 8, 32, 32, 4096, 64),
    Decoding("decoding-1x64k", 1, 64, 8, 65536, 128),
)


def rehearsal_of(decoding: Decoding) -> Decoding:
    """The same, small enough for a CPU."""
    return replace(decoding, batch=min(decoding.batch, 2), heads=2 * decoding.heads // decoding.kv_heads, kv_heads=2, keys=40, head_dim=16)


def caches_of(decoding: Decoding, inputs: Inputs) -> dict[str, KVCache | PagedKVCache]:
    """The same keys in a row, and in pages that lie between those of other members."""
    batch, keys = decoding.batch, decoding.keys
    facts: dict[str, Any] = {"dtype": inputs.k.dtype, "device": inputs.k.device}
    made: dict[str, KVCache | PagedKVCache] = {"in a row": KVCache(batch, keys, decoding.kv_heads, decoding.head_dim, **facts)}
    for size in decoding.page_sizes:
        pages = PagedKVCache(batch, batch * (-(-keys // size) + 1), decoding.kv_heads, decoding.head_dim, page_size=size, **facts)
        made[f"pages of {size}"] = pages
    for cache in made.values():
        for first in range(0, keys, 256):
            rows = slice(first, first + 256)
            cache.append(inputs.k[:, :, rows], inputs.v[:, :, rows])
    return made


def steps_of(decoding: Decoding, dtype: str, device: str) -> tuple[dict[str, Callable[[], Tensor]], Inputs]:
    """A step over each cache, and a copy of as many bytes as it reads."""
    inputs = decoding.case(DTYPES[dtype]).make(torch.device(device))
    steps: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(attention_with_cache, inputs.q, cache) for name, cache in caches_of(decoding, inputs).items()
    }
    source = torch.stack((inputs.k, inputs.v))
    steps[COPY] = functools.partial(torch.empty_like(source).copy_, source)
    return steps, inputs


def race(decoding: Decoding, dtype: str, protocol: Protocol) -> dict[str, Any]:
    """Of each cache the microseconds of a step, its bytes a second, their share of the copy's, and the share of the error allowed.

    Raises RuntimeError where a step is wrong: it has no speed then.
    """
    steps, inputs = steps_of(decoding, dtype, protocol.device)
    used = {name: _judged(name, step(), inputs, decoding.judged) for name, step in steps.items() if name != COPY}
    timings, _ = protocol.time_in_turns(steps)
    read = 2 * inputs.k.numel() * inputs.k.element_size()
    copied = 2 * read / timings[COPY].median
    found = {
        name: {
            "microseconds": 1e6 * timings[name].median,
            "bytes_per_second": read / timings[name].median,
            "copy_share": read / timings[name].median / copied,
            "error_share": used[name],
        }
        for name in used
    }
    return {"shape": f"batch {decoding.batch}, heads {decoding.heads}/{decoding.kv_heads}, {decoding.keys} keys", "decoding_steps": found}


def _judged(name: str, out: Tensor, inputs: Inputs, members: int) -> float:
    """The share of the elementwise bound that the last members of a result use; a RuntimeError where it is more than all."""
    last = inputs.changed(**{tensor: getattr(inputs, tensor)[-members:] for tensor in ("q", "k", "v")})
    report = measure({"out": out[-members:]}, last.truth(backward=False))
    if not report.used <= 1.0:
        raise RuntimeError(f"{name}: out uses {report.used:.3g} times its bound")
    return report.used
