"""What must notice a fault where the Triton kernels read keys in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fused_attention.testing import Case

from .kernel_checks import run, take
from .kernel_problems import DECODE

GROUPS: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 2, "seqlen_k": 70, "head_dim": 5, "head_dim_v": 3}


def check_pages() -> None:
    """Keys in pages give the bits of keys in a row, and what nobody sees may be NaN: parts of a tile, one, two, one and a half."""
    from tests.triton.paged_calls import in_pages

    for lengths, sizes in ((((17, 65), (3, 34)), (5, 32)), (((18, 69), (1, 33)), (16, 24))):
        inputs = Case("paged", **GROUPS, kv_lengths=lengths, alibi_slopes="h").make()
        expected = run(inputs, DECODE, backward=False)["out"]
        for size in sizes:
            out = in_pages(inputs, size).out()
            assert torch.equal(out, expected), f"pages of {size} differ by {(out - expected).abs().max()}"


def check_page_memory() -> None:
    """No number in a page table leads outside the pages, and no key that is not there asks the table."""
    from tests.triton.memcheck import memcheck
    from tests.triton.paged_calls import in_pages
    from tests.triton.test_memory_safety import hostile

    random = np.random.default_rng(0)
    take(DECODE)
    inputs = Case("hostile", batch=15, heads=1, seqlen_q=1, seqlen_k=20).make()
    for size in (7, 16):
        paged = in_pages(inputs, size)
        table = hostile(random, (-(-20 // size),), torch.int32, len(paged.k))  # as wide as keys need: one more has no number
        with memcheck() as check:
            out = paged._replace(table=table).out()
            check.results(out)


def check_far_pages() -> None:
    """Numbers of a page table 2**30 elements apart, along either side."""
    from tests.triton.far_apart import far_apart
    from tests.triton.memcheck import memcheck
    from tests.triton.paged_calls import in_pages

    take(DECODE)
    for size, seqlen_k in ((3, 9), (16, 35)):
        paged = in_pages(Case("far", batch=3, heads=1, seqlen_q=1, seqlen_k=seqlen_k).make(), size)
        for axis in range(2):
            far = paged._replace(table=far_apart(paged.table, axis))
            with memcheck():
                out = far.out()
            assert torch.equal(out, paged.out())


PAGE_CHECKS: tuple[Callable[[], None], ...] = (check_pages, check_page_memory, check_far_pages)
