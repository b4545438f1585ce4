"""Faults to plant where the Triton kernels read keys in pages; see kernel_faults.py."""

# A fault a line, where it fits.
# fmt: off
from __future__ import annotations

from .mask_faults import Table

PAGES: Table = {
    "table-row-of-the-first-member": ("pages", "tl.cast(batch, tl.int64) * pages.batch", "tl.cast(0, tl.int64) * pages.batch"),
    "table-row-in-int32": ("far_pages", "tl.cast(batch, tl.int64) * pages.batch", "batch * pages.batch"),
    "table-column-in-int32": ("far_pages", "tl.cast(start_n // PAGE_SIZE, tl.int64) * pages.column", "start_n // PAGE_SIZE * pages.column"),
    "table-column-of-each-key-in-int32": (
        "far_pages",
        "(slot // PAGE_SIZE).to(tl.int64) * pages.column",
        "slot // PAGE_SIZE * pages.column"),
    "table-taken-for-contiguous": (
        "far_pages",
        "tl.cast(start_n // PAGE_SIZE, tl.int64) * pages.column",
        "tl.cast(start_n // PAGE_SIZE, tl.int64)"),
    "table-strides-swapped": ("pages", "Pages(table, *table.stride(), len(k))", "Pages(table, *table.stride()[::-1], len(k))"),
    "keys-without-a-page-looked-up": ("page_memory", ", mask=real(first, last, BLOCK_N), other=0)", ")"),
    "page-not-clamped": ("page_memory", "clamp(number, 0, pages.count - 1)", "number"),
    "page-past-the-last": ("page_memory", "clamp(number, 0, pages.count - 1)", "clamp(number, 0, pages.count)"),
    "page-before-the-first": ("page_memory", "clamp(number, 0, pages.count - 1)", "clamp(number, -1, pages.count - 1)"),
    "pages-counted-by-their-rows": ("pages", "Pages(table, *table.stride(), len(k))", "Pages(table, *table.stride(), k.shape[2])"),
    "slot-counted-from-the-first-page": ("pages", "slot % PAGE_SIZE", "slot"),
    "tile-across-pages-taken-for-one": ("pages", "page_size % block == 0", "page_size >= block"),
    "tile-on-a-page-taken-for-a-row": ("pages", "tl.cast(start_n // PAGE_SIZE, tl.int64)", "tl.cast(start_n // BLOCK_N, tl.int64)"),
    "page-rows-before-the-first-loaded": ("pages", "(rows >= first) & (rows < last)", "rows < last"),
    "page-rows-behind-the-last-loaded": ("pages", "(rows >= first) & (rows < last)", "(rows >= first) & (rows <= last)"),
    "page-of-another-head": ("pages", "row_pointers(x, page[:, None], head, slot", "row_pointers(x, page[:, None], 0, slot"),
}
