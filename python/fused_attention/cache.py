"""KVCache: the keys and values of earlier tokens in memory set aside once, so that a new token costs one pass over them.

    row i of an append to member b  ->  slot lengths[b] + i,        member b sees the slots [starts[b], lengths[b])

Slots past the length hold whatever they hold, NaN included: nobody sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from . import host
from .validation import DTYPES, INDEX_DTYPES

STRIDE = 256  # slots: the keys that a call is shown grow by so many, and calls between are alike to whoever remembers plans

Counts = Sequence[int] | Tensor  # one for each member


class Cache(ABC):
    """What every cache of keys and values is: members with [start, length), and the checks of what is appended to them."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, head_dim_v: int | None, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self.kv_heads, self.head_dim = count("kv_heads", kv_heads), count("head_dim", head_dim)
        self.head_dim_v = self.head_dim if head_dim_v is None else count("head_dim_v", head_dim_v)
        if dtype not in DTYPES:
            raise TypeError(f"dtype is {dtype}, expected float16, bfloat16, float32 or float64")
        self.dtype = dtype
        self.ranges = self._memory(count("batch", batch), 2, dtype=torch.int32, device=device).zero_()
        self.device = self.ranges.device

    @property
    def batch(self) -> int:
        return self.ranges.shape[0]

    @property
    def starts(self) -> Tensor:
        """The first slot of each member that is no padding: (batch,), int32, on the device."""
        return self.ranges[:, 0]

    @property
    def lengths(self) -> Tensor:
        """How many slots of each member are filled, padding included: (batch,), int32, on the device."""
        return self.ranges[:, 1]

    @property
    @abstractmethod
    def bound(self) -> int:
        """No length exceeds it."""

    @abstractmethod
    def _chosen(self, members: Sequence[int] | None) -> Sequence[int]:
        """The members that a call is about; a TypeError or ValueError for others than the cache can compute by themselves."""

    @abstractmethod
    def _reach(self, chosen: Sequence[int], more: int) -> int:
        """No length of these members exceeds it after `more` rows are appended, now or whenever a graph that is captured now runs."""

    @abstractmethod
    def _shape_of(self, chosen: Sequence[int], more: int) -> tuple[Tensor, Tensor]:
        """Tensors like those of `keys_of` after `more` rows are appended, whatever they hold."""

    @abstractmethod
    def keys_of(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """k and v of members, at least as many as they hold: (members, kv_heads, keys, head_dim or head_dim_v)."""

    @abstractmethod
    def _put(self, k: Tensor, v: Tensor, new_lengths: Counts | None, chosen: Sequence[int]) -> None:
        """Append rows that were checked; a ValueError where they find no room."""

    def pad_left(self, padding: Tensor, members: Sequence[int] | None = None) -> None:
        """Hide the first padding[b] slots of each member, before or after they are filled: prompts padded on the left to one length.

        padding: int32 or int64 (batch,); a TypeError or ValueError for anything else. members: of a PagedKVCache, whom it is about.
        """
        chosen = self._chosen(members)
        starts = indices("padding", padding, len(chosen), self.device).clamp(min=0).to(torch.int32)
        self.starts[self._index_of(chosen)] = starts

    def _ranges_at(self, at: slice | Tensor) -> Tensor:
        """[start, length) of members: (members, 2), int32."""
        return self.ranges if isinstance(at, slice) else self.ranges[at]

    def _index_of(self, chosen: Sequence[int]) -> slice | Tensor:
        """What picks members out of the tensors of all, which a range is."""
        return slice(None) if isinstance(chosen, range) else torch.tensor(chosen, dtype=torch.int64).to(self.device, non_blocking=True)

    def _check_rows(self, k: Tensor, v: Tensor, members: int) -> None:
        """A TypeError or ValueError for keys and values that this cache, or so many members of it, cannot take."""
        shown = f"({members}, {self.kv_heads}, new rows, head_dim {self.head_dim} of k and {self.head_dim_v} of v)"
        for name, x, width in (("k", k, self.head_dim), ("v", v, self.head_dim_v)):
            self._check_operand(name, x)
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (members, self.kv_heads, width):
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shown} as the cache was made for")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"k has {k.shape[2]} rows, v has {v.shape[2]}: every new key needs its value")

    def _check_operand(self, name: str, x: Tensor) -> None:
        """A TypeError or ValueError for a tensor of another kind than the cache, or one that wants a gradient."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a torch.Tensor (batch, heads, rows, head_dim)")
        if x.dtype is not self.dtype:
            raise TypeError(f"{name} is {x.dtype}, the cache {self.dtype}: make the cache with dtype={x.dtype}, or convert {name}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}, the cache on {self.device}: make the cache with device={str(x.device)!r}")
        refuse_gradient(name, x)

    def _memory(self, *shape: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """Uninitialised memory that may be written under torch.inference_mode and outside of it."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)


class KVCache(Cache):
    """Keys and values of `batch` sequences, each of up to `capacity` tokens, in one tensor each.

    Args:
        batch: how many sequences (members); capacity: slots of each.
        kv_heads, head_dim, head_dim_v: as `attention` has them; head_dim_v is head_dim unless given.
        dtype: float16, bfloat16, float32 or float64; device: where it lies.

    Attributes:
        k, v: (batch, kv_heads, capacity, head_dim or head_dim_v), written in place.
        lengths, starts: (batch,), int32, on the device: member b holds the slots [starts[b], lengths[b]), the ones before are padding.
        bound: an int that no length exceeds. Off the CPU it counts what was appended, for the host waits for no device, and what
            `truncate` took by a tensor is not taken off it.

    For inference alone: appending what wants a gradient is a ValueError. While a CUDA graph is captured, and ever after, the host has no
    bound: `append` raises no more, and rows past the capacity are dropped on the device.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, head_dim_v, dtype, device)
        self.capacity = count("capacity", capacity)
        self._k, self._v = self._rows(batch)
        self._counted: int | None = 0  # None: a graph may append without the host

    @property
    def k(self) -> Tensor:
        return self._k[:, :, : self.capacity]

    @property
    def v(self) -> Tensor:
        return self._v[:, :, : self.capacity]

    @property
    def bound(self) -> int:
        lengths = self._seen_lengths()
        if lengths is not None:
            return max(lengths, default=0)
        return self.capacity if self._counted is None else self._counted

    def append(self, k: Tensor, v: Tensor, *, new_lengths: Tensor | None = None) -> None:
        """Write new keys and values behind those of every member.

        Args:
            k: (batch, kv_heads, rows, head_dim); v: (batch, kv_heads, rows, head_dim_v); of the cache's dtype, any strides.
            new_lengths: int32 or int64 (batch,): only so many of the rows of each member, the first ones, are real; the others are
                dropped. Default: all.

        Raises:
            ValueError, TypeError: an argument does not fit, or the capacity does not suffice; the cache is as it was.
        """
        self._check_rows(k, v, self.batch)
        self._put(k, v, new_lengths, range(self.batch))

    def _put(self, k: Tensor, v: Tensor, new_lengths: Counts | None, chosen: Sequence[int]) -> None:
        rows, held = k.shape[2], self._seen_lengths()
        kept = None if new_lengths is None else indices("new_lengths", new_lengths, self.batch, self.device).clamp(0, rows)
        self._reserve(rows, held, kept)
        if kept is None and held is not None and len(set(held)) == 1:
            slots = slice(held[0], held[0] + rows)
            self._k[:, :, slots], self._v[:, :, slots] = k, v
        else:
            self._scatter(k, v)  # of rows that are not kept the slots stay free
        self.lengths.add_(rows if kept is None else kept).clamp_(0, self.capacity)

    def truncate(self, lengths: int | Tensor) -> None:
        """Keep at most the first `lengths` slots of each member: an int for all, or int32 or int64 (batch,). 0 empties the cache.

        Raises ValueError or TypeError for a negative int, or anything that is neither.
        """
        if isinstance(lengths, Tensor):
            most = indices("lengths", lengths, self.batch, self.device).clamp(min=0).to(torch.int32)
        else:
            most = self.lengths.new_full((), count("lengths", lengths, least=0))
            self._counted = None if self._counted is None else min(self._counted, lengths)
        self.ranges.copy_(torch.minimum(self.ranges, most[..., None]).clamp(min=0))

    def reorder(self, index: Tensor) -> None:
        """Member b becomes a copy of what member index[b] was: the beams that go on. index: int32 or int64, of any length.

        With as many members as before the memory stays where it is; else new memory is taken. Indices outside count as the nearest end.
        """
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES or index.dim() != 1 or index.device != self.device:
            raise TypeError(f"index is {_described(index)}, expected an int32 or int64 tensor (batch,) on {self.device}")
        if len(index) > self.batch == 0:
            raise ValueError(f"index has {len(index)} entries, and the cache no member that they could go on from: make a new one")
        index, filled = index.clamp(0, self.batch - 1), slice(0, self.bound)
        old = self._k[:, :, filled], self._v[:, :, filled], self.ranges
        if len(index) != self.batch:
            self._k, self._v = self._rows(len(index))
            self.ranges = self._memory(len(index), 2, dtype=torch.int32, device=self.device)
        for new, x in zip((self._k[:, :, filled], self._v[:, :, filled], self.ranges), old, strict=True):
            new.copy_(x.index_select(0, index))

    def _chosen(self, members: Sequence[int] | None) -> Sequence[int]:
        if members is not None:
            raise TypeError("members is for a PagedKVCache: a KVCache computes all of its members, make one for each group of them")
        return range(self.batch)

    def _reach(self, chosen: Sequence[int], more: int) -> int:
        return self.capacity if host.capturing(self.device) else min(self.capacity, self.bound + more)

    def keys_of(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._shape_of(chosen, 0)

    def _shape_of(self, chosen: Sequence[int], more: int) -> tuple[Tensor, Tensor]:
        shown = min(self.capacity, -(-self._reach(chosen, more) // STRIDE) * STRIDE)
        return self._k[:, :, :shown], self._v[:, :, :shown]

    def _rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """Memory of k and v, with a slot past the capacity where rows that are dropped go."""
        shape = (batch, self.kv_heads, self.capacity + 1)
        k = self._memory(*shape, self.head_dim, dtype=self.dtype, device=self.device)
        return k, self._memory(*shape, self.head_dim_v, dtype=self.dtype, device=self.device)

    def _seen_lengths(self) -> list[int] | None:
        """The lengths, where they are in the host's memory."""
        seen = host.seen_values(self.lengths)
        return None if seen is None else [max(0, min(length, self.capacity)) for length in seen]

    def _reserve(self, rows: int, held: list[int] | None, kept: Tensor | None) -> None:
        """Count rows about to be appended; a ValueError where they do not fit."""
        if held is not None:
            longest = max(map(sum, zip(held, [rows] * self.batch if kept is None else kept.tolist(), strict=True)), default=0)
        elif self._counted is None or host.capturing(self.device):
            self._counted = None
            return
        else:
            longest = self._counted + (rows if self.batch else 0)
        if longest > self.capacity:
            raise ValueError(
                f"the cache has a capacity of {self.capacity}, and a member would hold up to {longest} rows with {rows} more: "
                "make it with a larger capacity, or truncate it"
            )
        self._counted = longest

    def _scatter(self, k: Tensor, v: Tensor) -> None:
        """Each row to its member's next slots, rows that do not fit to the slot past the capacity."""
        rows = torch.arange(k.shape[2], device=self.device)
        slots = (self.lengths.clamp(0, self.capacity)[:, None] + rows).clamp(max=self.capacity)
        members = torch.arange(self.batch, device=self.device)[:, None]
        self._k[members, :, slots] = k.transpose(1, 2)
        self._v[members, :, slots] = v.transpose(1, 2)


def count(name: str, number: int, least: int = 1) -> int:
    """The number, or a ValueError unless it is an int of at least `least`."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name} is {number!r}, expected an int of at least {least}")
    return number


def indices(name: str, tensor: object, batch: int, device: torch.device) -> Tensor:
    """The tensor, or a TypeError or ValueError unless it is an int of every member on the device."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} is {_described(tensor)}, expected an int32 or int64 tensor ({batch},)")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the cache on {device}: move it with {name}.to({str(device)!r})")
    if tuple(tensor.shape) != (batch,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({batch},): one for each member of the cache")
    return tensor


def refuse_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and caches are for inference: call under torch.no_grad(), or pass {name}.detach()")


def _described(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
