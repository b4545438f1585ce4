"""attention_with_cache: append a step's keys and values to a cache, turn them by their positions, and attend to all that it holds.

k_new, q turned at their slots  ->  slots [length, length + rows)  ->  attention(q, slots [start, length + rows))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import autocast, cpu_pages, cuda_pages, host, triton_backend
from .backend import Explanation, explanation
from .cache import Cache, Counts, KVCache, refuse_gradient
from .functional import attention
from .listeners import unheard
from .paging import PagedKVCache
from .plans import plan
from .problem import Layout, Problem
from .rotary import LinearScaling, Llama3Scaling, NTKScaling, Rotary, Tables, YarnScaling, apply_rotary
from .validation import check

OPTIONS = frozenset(("causal", "window", "alibi_slopes", "softcap", "sinks", "scale"))  # that a call shares with `attention`
CONSTANT = (type(None), LinearScaling, NTKScaling, YarnScaling, Llama3Scaling)  # scalings that do not change: their tables are remembered
SHORTEST_TABLE = 256  # positions; longer ones are powers of 2, so that few are made

PagesReader = Callable[[Tensor, Tensor, Tensor, Tensor, Problem], Tensor | None]  # None: the call does not suit the kernels


def attention_with_cache(
    q: Tensor,
    cache: KVCache | PagedKVCache,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    new_lengths: Counts | None = None,
    members: Sequence[int] | None = None,
    rotary: Rotary | tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over what a cache holds, after this call's own keys and values were appended to it.

    The last query stands at the last key: a decoding step is one row of each, a chunk of a prompt several, with causal=True. Without k
    and v nothing is appended, as in cross-attention; then q may have a multiple of the cache's members, beams that read one memory, unless
    an option counts positions (causal, window, alibi_slopes, rotary). With new_lengths query i stands where new key i does, and rows past a
    member's new_lengths give what nobody should read.

    Args:
        q: (batch, heads, seqlen_q, head_dim) of the cache's dtype, any strides; heads is a multiple of kv_heads. Of beams
            (batch * beams, heads, seqlen_q, head_dim): those of a member follow one another.
        cache: a KVCache or PagedKVCache; k and v go into it.
        k: (batch, kv_heads, rows, head_dim); v: (batch, kv_heads, rows, head_dim_v); both or neither.
        new_lengths: (batch,), how many of the new rows of each member, from the first, are real; the others are dropped. With one query
            for each new key.
        members: of a PagedKVCache, the ones that q, k and v are of, each once; default all.
        rotary: turns q and k, each at its slot minus its member's start; keys lie in the cache as they were turned. A Rotary, or tables
            (cos, sin) of `apply_rotary`, of every position: where the host sees no lengths, of every slot that this call, or the CUDA
            graph that it becomes part of, may fill. Who has other positions turns q and k before.
        interleaved: how the tables pair elements, as in `apply_rotary`; a Rotary says so itself.
        causal, window, alibi_slopes, softcap, sinks, scale, backend: as in `attention`.

    Returns:
        (batch, heads, seqlen_q, head_dim_v) in q's dtype, laid out as torch.empty_like(q) (`reference`, and beams: as it falls).

    Raises:
        ValueError, TypeError, NotImplementedError: as `attention` and the cache's append; the cache is then as it was.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
    }
    given = _given(options)
    q, k, v = autocast.cast(q, k, v)
    chosen, more, beams = _check(q, cache, k, v, new_lengths, members, given, rotary)
    q, at = _folded(q, beams), cache._index_of(chosen)
    ranges = cache._ranges_at(at)
    problem, name, _ = plan(q, *cache._shape_of(chosen, more), given | {"kv_lengths": ranges}, backend)
    if rotary is not None:
        q, k = _turn(q, k, cache, chosen, ranges, rotary, interleaved)
    elif interleaved:
        raise ValueError("interleaved is True and rotary is None: give the tables (cos, sin) whose pairs it is about")
    if new_lengths is not None:
        given["offset"] = ranges[:, 1].clone()
    if k is not None and v is not None:
        cache._put(k, v, new_lengths, chosen)
    given["kv_lengths"] = cache._ranges_at(at)
    if isinstance(cache, PagedKVCache):
        problem = problem._replace(kv_lengths=given["kv_lengths"], offset=given.get("offset"))
        out = _read(q, cache, cache._table_of(chosen, at), problem, name)
        if out is not None:
            return _unfolded(out, beams)
    return _unfolded(attention(q, *cache.keys_of(chosen), **given, backend=name), beams)


def explain(
    q: Tensor,
    cache: KVCache | PagedKVCache,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    new_lengths: Counts | None = None,
    members: Sequence[int] | None = None,
    rotary: Rotary | tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Explanation:
    """Which backend `attention_with_cache` would take with the same arguments, and why not the others; nothing is run or appended.

    Of a PagedKVCache, whose pages may have to be copied first, a PagedExplanation.
    """
    q, k, v = autocast.cast(q, k, v)
    given = _given(options)
    unknown = given.keys() - OPTIONS
    if unknown:
        raise TypeError(f"explain() of a cache got {', '.join(sorted(unknown))}: it takes the options of attention_with_cache")
    chosen, more, beams = _check(q, cache, k, v, new_lengths, members, given, rotary)
    q = _folded(q, beams)
    problem = check(q, *cache._shape_of(chosen, more), **given, kv_lengths=cache._ranges_at(cache._index_of(chosen)))
    found = explanation(problem, backend)
    if not isinstance(cache, PagedKVCache):
        return found
    return PagedExplanation(found.backend, found.reasons, _copied(q, cache, problem, found.backend))


@dataclass(frozen=True)
class PagedExplanation(Explanation):
    """Besides, why the call would copy the pages of its members first; None: they are read where they lie."""

    copied: str | None

    def __str__(self) -> str:
        return f"{super().__str__()}\n  pages: {'read where they lie' if self.copied is None else f'copied first, for {self.copied}'}"


def _copied(q: Tensor, cache: PagedKVCache, problem: Problem, backend: str) -> str | None:
    if _reader(backend) is None:
        return f"the {backend} backend reads keys in a row"
    if _heard(q, cache, cache.page_table, problem):
        return "somebody listens to the call: a compiler, a profiler, a transform or a mode"

    def taken(nobody: Tensor) -> bool:  # whom a kernel takes as it takes others, and has nothing to compute for
        asked = problem._replace(q=Layout.of(nobody), alibi_slopes=None, sinks=None)
        return _read(nobody, cache, cache.page_table[:0], asked, backend) is not None

    if taken(q[:0]):
        return None
    dims, kernel = f"head_dim {problem.head_dim} and head_dim_v {problem.head_dim_v}", f"the {backend} backend's kernel for pages"
    if taken(q[:0, : cache.kv_heads, :1]):
        return f"{problem.seqlen_q} x {problem.group} queries of a key head are more than {kernel} takes at {dims}"
    return f"{dims} do not suit {kernel}"


def _read(q: Tensor, cache: PagedKVCache, page_table: Tensor, problem: Problem, backend: str) -> Tensor | None:
    """The output over pages where they lie; None where no kernel suits, or somebody listens: they take addresses."""
    reader = _reader(backend)
    return None if reader is None or _heard(q, cache, page_table, problem) else reader(q, cache.k, cache.v, page_table, problem)


def _heard(q: Tensor, cache: PagedKVCache, page_table: Tensor, problem: Problem) -> bool:
    options = problem.kv_lengths, problem.alibi_slopes, problem.sinks
    return torch.compiler.is_compiling() or not unheard(q, cache.k, cache.v, page_table, *options)


def _reader(backend: str) -> PagesReader | None:
    return {"cpu": cpu_pages.attend, "cuda": cuda_pages.attend, "triton": triton_backend.attend_pages}.get(backend)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that `attention` is told; a causal of None is one, for it is refused there."""
    return {name: value for name, value in options.items() if value is not None or name == "causal"}


def _check(
    q: Tensor,
    cache: Cache,
    k: Tensor | None,
    v: Tensor | None,
    new_lengths: Counts | None,
    members: Sequence[int] | None,
    options: dict[str, Any],
    rotary: Rotary | tuple[Tensor, Tensor] | None,
) -> tuple[Sequence[int], int, int]:
    """The members of the call, its number of new keys and its beams for each member, or what is wrong with its tensors."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache is a {type(cache).__name__}, expected a KVCache or PagedKVCache")
    chosen = cache._chosen(members)
    cache._check_operand("q", q)
    positioned = _positioned(options | {"k": k, "rotary": rotary})
    beams = 1 if positioned or not chosen or q.dim() != 4 else max(1, len(q) // len(chosen))
    if q.dim() != 4 or (len(q), q.shape[3]) != (beams * len(chosen), cache.head_dim) or q.shape[1] % cache.kv_heads or not q.shape[1]:
        expected = f"({len(chosen)}, a multiple of kv_heads {cache.kv_heads}, seqlen_q, head_dim {cache.head_dim})"
        besides = _of_beams(len(chosen), positioned) if chosen and q.dim() == 4 and len(q) != len(chosen) else ""
        raise ValueError(f"q has shape {tuple(q.shape)}, expected {expected} as the cache was made for{besides}")
    if (k is None) != (v is None):
        given, missing = ("v", "k") if k is None else ("k", "v")
        raise ValueError(f"{given} is given and {missing} is None: give both to append them, or neither")
    if k is not None and v is not None:
        cache._check_rows(k, v, len(chosen))
    more = 0 if k is None else k.shape[2]
    if new_lengths is not None and (k is None or more != q.shape[2]):
        raise ValueError(f"new_lengths is given with {q.shape[2]} queries and {more} new keys: it needs one new key for each query")
    for name in ("alibi_slopes", "sinks"):
        if isinstance(options.get(name), Tensor):
            refuse_gradient(name, options[name])
    return chosen, more, beams


def _positioned(given: dict[str, Any]) -> list[str]:
    """Those of the options that count positions: rows of a member's beams have none of their own."""
    window = given.get("window")
    bounded = not isinstance(window, (tuple, list)) or any(side is not None for side in window)
    counted = given | {"window": window if bounded else None, "causal": given.get("causal") or None}
    return [name for name in ("k", "rotary", "causal", "window", "alibi_slopes") if counted.get(name) is not None]


def _of_beams(members: int, positioned: list[str]) -> str:
    beams = f"a multiple of {members} in place of it, beams that read one memory"
    return f"; {beams}, is for calls without {' and '.join(positioned)}" if positioned else f"; or {beams}"


def _folded(q: Tensor, beams: int) -> Tensor:
    """The beams of a member as rows of its own: each key is read once for all of them."""
    return q if beams == 1 else q.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def _unfolded(out: Tensor, beams: int) -> Tensor:
    return out if beams == 1 else out.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


def _turn(
    q: Tensor,
    k: Tensor | None,
    cache: Cache,
    chosen: Sequence[int],
    ranges: Tensor,
    rotary: Rotary | tuple[Tensor, Tensor],
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """q and the new keys, each row turned by its position, counted from its member's start."""
    more = 0 if k is None else k.shape[2]
    places = ranges[:, 1] - ranges[:, 0]
    seen = host.seen_values(places)
    cos, sin, interleaved = _tables(rotary, interleaved, cache, cache._reach(chosen, more) if seen is None else more + max(0, 0, *seen))
    first_key: int | Tensor = seen[0] if seen is not None and len(set(seen)) == 1 else places

    def turned(x: Tensor, first: int | Tensor) -> Tensor:
        if isinstance(first, int) and first >= 0:
            return apply_rotary(x, cos, sin, positions=first, interleaved=interleaved)
        rows = torch.arange(x.shape[2], device=x.device)
        return apply_rotary(x, cos, sin, positions=rows + (first[:, None] if isinstance(first, Tensor) else first), interleaved=interleaved)

    if k is None:
        return turned(q, first_key - q.shape[2]), None
    if q.shape[2] == more == 1:  # one call for both is faster, and the layout of a single row is the same in every order
        q, k = turned(torch.cat((q, k), 1), first_key).split((q.shape[1], k.shape[1]), 1)
        return q, k
    return turned(q, first_key + more - q.shape[2]), turned(k, first_key)


def _tables(rotary: Rotary | tuple[Tensor, Tensor], interleaved: bool, cache: Cache, positions: int) -> tuple[Tensor, Tensor, bool]:
    """cos, sin and how they pair elements, for so many positions."""
    if isinstance(rotary, Rotary):
        if interleaved:
            raise ValueError("interleaved is True beside a Rotary, which says itself how it pairs elements: give Rotary(interleaved=True)")
        dtype = torch.float64 if cache.dtype is torch.float64 else torch.float32
        length = max(SHORTEST_TABLE, 1 << (positions - 1).bit_length())
        constant = type(rotary) is Rotary and type(rotary.scaling) in CONSTANT
        # What a tracer or a graph's capture makes holds no numbers yet.
        recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or host.capturing(cache.device)
        make = _remembered_tables if constant and not recorded else type(rotary).tables
        return *make(rotary, length, cache.head_dim, device=cache.device, dtype=dtype), rotary.interleaved
    if not isinstance(rotary, tuple) or len(rotary) != 2 or not all(isinstance(table, Tensor) for table in rotary):
        raise TypeError(f"rotary is a {type(rotary).__name__}, expected a Rotary, a pair of tables (cos, sin), or None")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        refuse_gradient(name, table)
    if rotary[0].dim() == 2 and rotary[0].shape[0] < positions:
        raise ValueError(f"cos has {rotary[0].shape[0]} positions, and a row can come to stand at {positions - 1}: make longer tables")
    return *rotary, interleaved


@functools.lru_cache(maxsize=16)
def _remembered_tables(rotary: Rotary, length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tables:
    with torch.inference_mode(False):
        return rotary.tables(length, head_dim, device=device, dtype=dtype)
