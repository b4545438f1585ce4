"""PagedKVCache: keys and values in pages that members take as they grow and may share, so that no memory waits for a length not reached.

    slot s of member b  ->  row s % page_size of page page_table[b, s // page_size]

A page counts the members that share it; who writes to a shared one writes to a copy. The host hands pages out, and knows every length.
Source: Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .cache import STRIDE, Cache, Counts, count


class PagedKVCache(Cache):
    """Keys and values of `batch` sequences (members) of any lengths, in `pages` pages of page_size tokens that they share.

    Args:
        batch: how many members; each is empty at first, and again after `free`.
        pages: of all members together.
        kv_heads, head_dim, head_dim_v: as `attention` has them; head_dim_v is head_dim unless given.
        page_size: tokens, any number.
        dtype: float16, bfloat16, float32 or float64.
        device: where it lies.

    Attributes:
        k, v: (pages, kv_heads, page_size, head_dim or head_dim_v), written in place.
        page_table: (batch, pages), int32, on the device: each member's pages in order; read as cut to the pages there are.
        lengths, starts: (batch,), int32, on the device: member b holds the slots [starts[b], lengths[b]), the ones before are padding.
        bound: the largest length. free_pages: how many pages nobody holds.

    For inference alone: appending what wants a gradient is a ValueError. The host hands the pages out, so no CUDA graph can hold an append.
    """

    def __init__(
        self,
        batch: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, head_dim_v, dtype, device)
        self.pages, self.page_size = count("pages", pages), count("page_size", page_size)
        shape = (pages + 1, kv_heads, page_size)  # the last page takes the rows that are dropped
        self._k = self._memory(*shape, self.head_dim, dtype=dtype, device=self.device)
        self._v = self._memory(*shape, self.head_dim_v, dtype=dtype, device=self.device)
        self.page_table = self._memory(batch, pages, dtype=torch.int32, device=self.device).zero_()
        self._held: list[list[int]] = [[] for _ in range(batch)]  # pages of each member
        self._lengths = [0] * batch
        self._sharers = [0] * pages
        self._free = list(reversed(range(pages)))

    @property
    def k(self) -> Tensor:
        return self._k[: self.pages]

    @property
    def v(self) -> Tensor:
        return self._v[: self.pages]

    @property
    def bound(self) -> int:
        return max(self._lengths, default=0)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def append(self, k: Tensor, v: Tensor, *, new_lengths: Counts | None = None, members: Sequence[int] | None = None) -> None:
        """Write new keys and values behind those of members, on pages of their own.

        Args:
            k: (members, kv_heads, rows, head_dim); v: (members, kv_heads, rows, head_dim_v); of the cache's dtype, any strides.
            new_lengths: ints, or an int tensor on the CPU: only so many of the rows of each, the first ones, are real; the others are
                dropped. Default: all.
            members: which members, each once. Default: all, in order.

        Raises:
            ValueError, TypeError: an argument does not fit, or the pages do not suffice; the cache is as it was.
        """
        chosen = self._chosen(members)
        self._check_rows(k, v, len(chosen))
        self._put(k, v, new_lengths, chosen)

    def _put(self, k: Tensor, v: Tensor, new_lengths: Counts | None, chosen: Sequence[int]) -> None:
        rows = k.shape[2]
        kept = (
            [rows] * len(chosen) if new_lengths is None else [min(each, rows) for each in self._counts("new_lengths", new_lengths, chosen)]
        )
        self._reserve(chosen, kept)
        cells = [cell for member, more in zip(chosen, kept, strict=True) for cell in self._grow(member, more)]
        places = self._places(chosen, kept, rows)
        for member, more in zip(chosen, kept, strict=True):
            self._lengths[member] += more
        # In one transfer, for each costs the host more than its numbers do.
        parts = (self._lengths, *places, *zip(*cells, strict=True))
        numbers = torch.tensor(list(chain(*parts)), dtype=torch.int64).to(self.device, non_blocking=True)
        lengths, pages, slots, *grown = numbers.split([len(part) for part in parts])
        self.lengths.copy_(lengths)
        if grown:
            members, columns, taken = grown
            self.page_table[members, columns] = taken.to(torch.int32)
        at = pages.view(len(chosen), rows), slice(None), slots.view(len(chosen), rows)
        self._k[at], self._v[at] = k.transpose(1, 2), v.transpose(1, 2)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Let an empty member begin with the first `length` slots of another, all unless given; nothing is copied until one of them writes.

        Raises ValueError where there is no such member, the target holds rows, or the source fewer than `length`.
        """
        (source, target), held = self._chosen((source, target)), self._lengths[source]
        length = held if length is None else count("length", length, least=0)
        if length > held:
            raise ValueError(f"length is {length}, and member {source} holds {held} rows: fork at most these")
        if self._lengths[target]:
            raise ValueError(f"member {target} holds {self._lengths[target]} rows: free it before it becomes a fork of member {source}")
        shared = self._held[source][: self._pages_of(length)]
        for page in shared:
            self._sharers[page] += 1
        self._held[target], self._lengths[target] = list(shared), length
        self.page_table[target].copy_(self.page_table[source])
        self.starts[target] = self.starts[source]
        self._show_lengths()

    def truncate(self, lengths: int | Counts, members: Sequence[int] | None = None) -> None:
        """Keep at most the first `lengths` slots of members: an int for all, or one for each. Pages that nobody holds any more are free."""
        chosen = self._chosen(members)
        most = [count("lengths", lengths, least=0)] * len(chosen) if isinstance(lengths, int) else self._counts("lengths", lengths, chosen)
        for member, length in zip(chosen, most, strict=True):
            self._lengths[member] = min(self._lengths[member], length)
            self._release(self._held[member], self._pages_of(self._lengths[member]))
        self._show_lengths()
        at = self._index_of(chosen)
        self.starts[at] = torch.minimum(self.starts[at], self.lengths[at])  # others may have padding that is not filled yet

    def free(self, member: int) -> None:
        """Empty a member: its pages go back to the others."""
        self.truncate(0, (member,))

    def reorder(self, index: Counts) -> None:
        """Member b becomes a fork of what member index[b] was: the beams that go on. Ints, or an int tensor on the CPU, of any length."""
        chosen = [self._member(each) for each in self._ints("index", index)]
        abandoned, ranges, table = self._held, self.ranges, self.page_table
        self._held, self._lengths = [list(abandoned[each]) for each in chosen], [self._lengths[each] for each in chosen]
        for page, more in Counter(page for held in self._held for page in held).items():
            self._sharers[page] += more
        for held in abandoned:
            self._release(held, 0)
        at = self._index_of(chosen)
        if len(chosen) != len(abandoned):
            self.ranges = self._memory(len(chosen), 2, dtype=torch.int32, device=self.device)
            self.page_table = self._memory(len(chosen), self.pages, dtype=torch.int32, device=self.device)
        self.ranges.copy_(ranges[at])
        self.page_table.copy_(table[at])

    def _chosen(self, members: Sequence[int] | None) -> Sequence[int]:
        """A range if it is all of them."""
        if members is None:
            return range(self.batch)
        members = [self._member(each) for each in members]
        if len(set(members)) != len(members):
            raise ValueError(f"members is {members}, expected each only once")
        return members

    def _reach(self, chosen: Sequence[int], more: int) -> int:
        return max((self._lengths[each] for each in chosen), default=0) + more

    def _table_of(self, chosen: Sequence[int], at: slice | Tensor) -> Tensor:
        """The pages of members, int32: as many as the longest of them holds, and some more. Whatever the page table holds is in it."""
        return self.page_table[at, : self._width(self._reach(chosen, 0))]

    def _shape_of(self, chosen: Sequence[int], more: int) -> tuple[Tensor, Tensor]:
        keys = self.page_size * self._width(self._reach(chosen, more))
        k, v = (x[0, 0, 0, :1].expand(len(chosen), self.kv_heads, keys, x.shape[3]) for x in (self._k, self._v))
        return k, v

    def keys_of(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies, which are as long as the longest of the members."""
        heads = torch.arange(self.kv_heads, device=self.device)[:, None]
        pages = self._table_of(chosen, self._index_of(chosen)).clamp(0, self.pages - 1).to(torch.int64)
        runs = pages[:, None] * self.kv_heads + heads  # of the rows that a head has in a page
        shape = (len(chosen), self.kv_heads, runs.shape[2] * self.page_size)
        k, v = (x.flatten(0, 1).index_select(0, runs.flatten()).view(*shape, x.shape[3]) for x in (self._k, self._v))
        return k, v

    def _width(self, length: int) -> int:
        """Pages of a call's longest member, rounded up as contiguous caches round their slots."""
        return min(self.pages, self._pages_of(-(-length // STRIDE) * STRIDE))

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _member(self, member: SupportsIndex) -> int:
        number = _whole(member)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.batch:
            raise ValueError(f"there is no member {number!r}: the cache has {self.batch}, the first is 0")
        return number

    def _ints(self, name: str, given: Counts) -> list[Any]:
        if isinstance(given, Tensor):
            if given.device.type != "cpu" or given.dim() != 1 or given.is_floating_point():
                got = f"{given.dtype} of shape {tuple(given.shape)} on {given.device}"
                raise TypeError(
                    f"{name} is {got}, expected ints or an int tensor on the CPU: the host hands out pages, and needs the values"
                )
            given = given.tolist()
        return [_whole(each) for each in given]

    def _counts(self, name: str, given: Counts, chosen: Sequence[int]) -> list[int]:
        ints = self._ints(name, given)
        if len(ints) != len(chosen):
            raise ValueError(f"{name} has {len(ints)} entries, expected {len(chosen)}: one for each member")
        return [count(name, each, least=0) for each in ints]

    def _reserve(self, chosen: Sequence[int], kept: Sequence[int]) -> None:
        """A ValueError where fewer pages are free than such an append takes, copies of shared ones included."""
        needed, copied = 0, Counter[int]()
        for member, more in zip(chosen, kept, strict=True):
            held = self._held[member]
            needed += self._pages_of(self._lengths[member] + more) - len(held)
            if self._writes_to_last(member, more) and self._sharers[held[-1]] - copied[held[-1]] > 1:
                copied[held[-1]] += 1
        needed += copied.total()
        if needed > self.free_pages:
            raise ValueError(
                f"{needed} pages are needed for {sum(kept)} new rows, and {self.free_pages} of {self.pages} are free: "
                "free or truncate members, or make the cache with more pages"
            )

    def _writes_to_last(self, member: int, more: int) -> bool:
        return more > 0 and self._lengths[member] % self.page_size > 0

    def _grow(self, member: int, more: int) -> list[tuple[int, int, int]]:
        """Give a member the pages that its new rows go to, a copy of a last page that it shares, and new ones: cells of the page table."""
        held = self._held[member]
        known = len(held)
        if self._writes_to_last(member, more) and self._sharers[held[-1]] > 1:
            known -= 1
            shared, held[-1] = held[-1], self._take()
            self._sharers[shared] -= 1
            self._k[held[-1]], self._v[held[-1]] = self._k[shared], self._v[shared]
        held += [self._take() for _ in range(self._pages_of(self._lengths[member] + more) - len(held))]
        return [(member, column, held[column]) for column in range(known, len(held))]

    def _take(self) -> int:
        page = self._free.pop()
        self._sharers[page] = 1
        return page

    def _release(self, held: list[int], keep: int) -> None:
        for page in held[keep:]:
            self._sharers[page] -= 1
            if self._sharers[page] == 0:
                self._free.append(page)
        del held[keep:]

    def _places(self, chosen: Sequence[int], kept: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
        """The page and the slot in it of each row, the page past the last of rows that are not kept."""
        pages: list[int] = []
        slots: list[int] = []
        for member, more in zip(chosen, kept, strict=True):
            first, end = self._lengths[member], self._lengths[member] + more
            for column in range(first // self.page_size, self._pages_of(end)):
                begin = column * self.page_size
                run = range(max(first, begin) - begin, min(end, begin + self.page_size) - begin)
                pages += [self._held[member][column]] * len(run)
                slots += run
            pages += [self.pages] * (rows - more)
            slots += [0] * (rows - more)
        return pages, slots

    def _show_lengths(self) -> None:
        self.lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32), non_blocking=True)


def _whole(number: Any) -> Any:
    """An int of what stands for one, as NumPy's do; anything else as it is, for whoever refuses it."""
    try:
        return number if isinstance(number, bool) else operator.index(number)
    except TypeError:
        return number
