"""What a decoder has read so far: for each of its layers the keys and values of the text, and of a memory if it looks at one.

logits of rows n ... m  =  decode(tokens n ... m, Caches of rows 0 ... n - 1)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_attention.layers.cached import AnyCache
from fused_attention.paging import PagedKVCache


@dataclass
class Caches:
    """One cache of self-attention for each layer, and of cross-attention where the model has an encoder.

    text: KVCache or PagedKVCache, all of the same lengths. memory: filled once, by the model that read the source; of as many members as
    there are sources, each of which successive members of the text share.
    """

    text: list[AnyCache]
    memory: list[AnyCache] = field(default_factory=list)

    def positions(self, rows: int, most: int) -> Tensor:
        """Where the next rows of each member stand in its text, (batch, rows), padding not counted: 0 for padding itself.

        A ValueError where caches that could hold more rows than `most`, the positions that the model has, would hold more by the host's
        count. In a CUDA graph there is no such count: of a KVCache with a larger capacity all rows behind have the last position there.
        """
        first = self.text[0]
        held = first.bound + rows
        if held > most and (isinstance(first, PagedKVCache) or first.capacity > most):
            raise ValueError(f"the caches would hold up to {held} rows, and the model has positions for {most} tokens: shorten the text")
        filled = first.lengths - first.starts
        return (filled[:, None] + torch.arange(rows, device=filled.device)).clamp(0, most - 1)

    def pad_left(self, padding: Tensor) -> None:
        """Declares the first padding[b] rows of member b padding, which nothing sees and no position counts."""
        for cache in self.text:
            cache.pad_left(padding)

    def repeat(self, copies: int) -> None:
        """Each member `copies` times, one after the other: the start of a beam search. Copies read one memory, which stays as it is."""
        _reorder(self.text, torch.arange(self.text[0].batch, device=self.text[0].lengths.device).repeat_interleave(copies))

    def reorder(self, index: Tensor) -> None:
        """Member b goes on from the text of member index[b], which reads the same memory."""
        _reorder(self.text, index)


def caches_of(layers: Iterable[Any], memory: Tensor, capacity: int, lengths: Tensor | None = None) -> Caches:
    """Caches for up to `capacity` rows of a text, with the keys and values of a memory (batch, seqlen, width), computed here once.

    lengths: (batch,), how many rows of each memory are no padding.
    """
    caches = Caches([], [])
    for layer in layers:
        caches.text.append(layer.self_attn.new_cache(memory.shape[0], capacity))
        caches.memory.append(layer.multihead_attn.new_cache(*memory.shape[:2]))
        layer.multihead_attn.remember(memory, caches.memory[-1], lengths)
    return caches


def _reorder(caches: list[AnyCache], index: Tensor) -> None:
    for cache in caches:
        if isinstance(cache, PagedKVCache):
            cache.reorder(index.tolist())  # the host deals out pages
        else:
            cache.reorder(index)
