"""Problems whose keys and values lie in pages: shuffled, among pages of NaN that nobody reads. Keys outside [start, end) are NaN too.

row j of member b  ->  slot j % page_size of page  table[b, j // page_size]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attention.testing import Inputs


class InPages(NamedTuple):
    q: Tensor
    k: Tensor  # (pages, kv_heads, page_size, head_dim)
    v: Tensor
    table: Tensor  # (batch, pages of a member), int32
    problem: Any

    def out(self) -> Tensor:
        from fused_attention.triton_backend import attend_pages  # whichever stands in for it

        out = attend_pages(*self)
        assert out is not None, "the kernel that reads pages does not take the call"
        return out


def in_pages(inputs: Inputs, page_size: int) -> InPages:
    """The inputs with each member's keys on pages of its own, and on two more of NaN."""
    from fused_attention.validation import check

    batch, _, seqlen_k, _ = inputs.k.shape
    columns = -(-seqlen_k // page_size) + 2
    table = torch.randperm(batch * columns, generator=torch.Generator().manual_seed(page_size)).view(batch, columns).to(torch.int32)
    lengths = inputs.options.get("kv_lengths", torch.full((batch,), seqlen_k))
    ranges = lengths if lengths.dim() == 2 else torch.stack([torch.zeros_like(lengths), lengths], 1)
    k, v = (_dealt(x, table, ranges, page_size) for x in (inputs.k, inputs.v))
    return InPages(inputs.q, k, v, table, check(inputs.q, inputs.k, inputs.v, **(inputs.options | {"kv_lengths": lengths})))


def _dealt(x: Tensor, table: Tensor, ranges: Tensor, page_size: int) -> Tensor:
    pages = x.new_full((table.numel(), x.shape[1], page_size, x.shape[3]), torch.nan)
    for member, row, (start, end) in zip(x, table, ranges.tolist(), strict=True):
        for slot in range(start, end):
            pages[row[slot // page_size], :, slot % page_size] = member[:, slot]
    return pages
