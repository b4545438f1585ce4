"""A generated token of a GPT with a cache on CPUs: against recomputing its whole text, after a short prefix, and with keys in pages.

bytes of a token = those of the weights + of the keys and values before it        a memory alone would make its time

`rows` is what goals.py lists: a title, a race, and how many times faster than each rival ours must be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attention import PagedKVCache
from fused_attention.models import GPT, GPTConfig
from fused_attention.models.caches import Caches

from .races import SEED, Race
from .workloads import DTYPES

SHORT, LONG = 64, 512  # tokens before the one that is timed
PAGE_SIZE = 16
CONFIG = GPTConfig(vocabulary=4096, context=1024, width=512, heads=8, layers=6, dropout=0.0)
RECOMPUTING, ROW = "recomputing", "keys in a row"


class Row(NamedTuple):
    title: str
    race: Callable[[], Race]
    must: Mapping[str, float]  # by rival
    aim: Mapping[str, float]


def rows(shrink: int = 1) -> Iterator[Row]:
    """All of them; every prefix is divided by `shrink`, for a test of the machinery."""
    short, long = SHORT // shrink, LONG // shrink
    for dtype in ("fp32", "bf16"):
        title = f"{dtype} GPT of 6 layers, width {CONFIG.width}, a token after"
        yield Row(f"{title} {long}", functools.partial(recomputing_race, long, dtype), {RECOMPUTING: 5.0}, {})
        yield Row(f"{title} {short}", functools.partial(recomputing_race, short, dtype), {RECOMPUTING: 1.0}, {})
        same = {f"after {short}": token_bytes(short, dtype) / token_bytes(long, dtype)}
        yield Row(f"{title} {long}, beside {short}", functools.partial(prefix_race, short, long, dtype), same, {})
        yield Row(f"{title} {long}, pages of {PAGE_SIZE}", functools.partial(pages_race, long, dtype), {ROW: 0.85}, {ROW: 1.0})


def token_bytes(prefix: int, dtype: str) -> int:
    """What a token has to read: every weight of the layers and of the last one, and the keys and values before it."""
    weights = CONFIG.layers * 12 * CONFIG.width**2 + CONFIG.vocabulary * CONFIG.width
    return (weights + CONFIG.layers * 2 * prefix * CONFIG.width) * DTYPES[dtype].itemsize


def recomputing_race(prefix: int, dtype: str) -> Race:
    """A token with a cache, against the text with it from the beginning; of both the last token's logits alone."""
    model, tokens = _model(dtype), _tokens(prefix)

    def recomputed() -> Tensor:
        return model.decode(tokens, model.new_caches(1, prefix + 1), last=True)

    return Race({"cached": _token(model, tokens, model.new_caches(1, prefix + 1)), RECOMPUTING: recomputed}, ours="cached")


def prefix_race(short: int, long: int, dtype: str) -> Race:
    """A token late in a text against an early one: what it takes longer is what it reads more."""
    model = _model(dtype)
    calls = {f"after {each}": _token(model, _tokens(each), model.new_caches(1, long + 1)) for each in (short, long)}
    return Race(calls, ours=f"after {long}")


def pages_race(prefix: int, dtype: str) -> Race:
    """A token over pages against the same over keys in a row."""
    model, tokens = _model(dtype), _tokens(prefix)
    caches = {"pages": _paged(prefix + 1, dtype), ROW: model.new_caches(1, prefix + 1)}
    return Race({name: _token(model, tokens, each) for name, each in caches.items()}, ours="pages")


@functools.cache
def _model(dtype: str) -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return GPT(CONFIG).to(DTYPES[dtype]).eval()


def _tokens(prefix: int) -> Tensor:
    """One more than the prefix: the token that is timed."""
    return torch.randint(CONFIG.vocabulary, (1, prefix + 1), generator=torch.Generator().manual_seed(SEED))


def _paged(capacity: int, dtype: str) -> Caches:
    pages, head_dim = -(-capacity // PAGE_SIZE), CONFIG.width // CONFIG.heads
    facts = {"page_size": PAGE_SIZE, "dtype": DTYPES[dtype]}
    return Caches([PagedKVCache(1, pages, CONFIG.heads, head_dim, **facts) for _ in range(CONFIG.layers)])


def _token(model: GPT, tokens: Tensor, caches: Caches) -> Callable[[], Tensor]:
    """The last token's logits over a cache that holds the others, and holds them again after each call."""
    with torch.no_grad():
        model.decode(tokens[:, :-1], caches, last=True)

    def decoded() -> Tensor:
        logits = model.decode(tokens[:, -1:], caches, last=True)
        for cache in caches.text:
            cache.truncate(tokens.shape[1] - 1)
        return logits

    return decoded
