"""A few tiny problems, forward and backward, and decoding over pages, for compute-sanitizer to watch: it runs this file as a program.

python tests/gpu/sanitized.py [DEVICE] [BACKEND]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from fused_attention import PagedKVCache, attention_with_cache
from fused_attention.testing import CASES

NAMES = ("base", "long-causal", "kv-range-window", "kv-untrusted", "mask-bh1k", "bias-1h11", "decode", "everything", "packed-everything")
PAGE_SIZES = (5, 128)  # a tile spans several, and divides one


def main(device: str, backend: str) -> None:
    cases = {case.name: case for case in CASES}
    for name in NAMES:
        replace(cases[name], dtype=torch.bfloat16).make(device).run(backend)
    for page_size in PAGE_SIZES:
        decode_pages(page_size, device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(NAMES) + len(PAGE_SIZES)} problems ran")


def decode_pages(page_size: int, device: str, backend: str) -> None:
    """A token of three sequences, two of them with page numbers that are none."""
    facts = {"page_size": page_size, "dtype": torch.bfloat16, "device": device}
    cache = PagedKVCache(3, 3 * -(-150 // page_size), 2, 64, **facts)
    x = torch.randn(3, 2, 150, 64, dtype=torch.bfloat16, device=device)
    cache.append(x, x, new_lengths=[150, 9, 131])
    cache.page_table[0, 0], cache.page_table[2, 1] = -1, 10**6
    attention_with_cache(x[:, :, :1].repeat(1, 4, 1, 1), cache, backend=backend)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda", "triton"]))
