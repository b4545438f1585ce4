"""Which tile a program computes: the longest rows or columns of a causal head first, a few heads at a time.

program -> (section of heads whose keys and values fit the L2 cache, tile from the last to the first, head within the section)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

H200_MULTIPROCESSORS = 132
L2_BYTES = 2**25  # of the H200's 50 MiB: the rest is for q and out, which pass through


def section(head_bytes: int, heads: int) -> int:
    """How many heads share the cache, of each of which so many bytes are read again and again."""
    return min(max(1, L2_BYTES // max(1, head_bytes)), heads)


def persistent(programs: int, device: torch.device) -> int:
    """One for each SM, and no more than there is work for."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H200_MULTIPROCESSORS
    return min(programs, count)


@triton.jit
def row_tile(program, batch_heads, row_tiles, section):
    """The head, counted through the batch, and the number of its tile of rows; columns count from the end."""
    first = program // (section * row_tiles) * section
    width = tl.minimum(section, batch_heads - first)
    inside = program - first * row_tiles
    return first + inside % width, row_tiles - 1 - inside // width
