"""A few small problems, forward and backward, and decoding over pages, for compute-sanitizer to watch: it runs this file as a program.

python tests/gpu/sanitized.py [DEVICE] [BACKEND]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from fused_attention import PagedKVCache, attention_with_cache
from fused_attention.testing import CASES, Case

# Triton would compile each kernel again under the tool, and its kernels differ by type in little.
DTYPES = {"cuda": (torch.bfloat16, torch.float32)}
NAMES = ("base", "long-causal", "kv-range-window", "kv-untrusted", "mask-bh1k", "bias-1h11", "decode", "everything", "packed-everything")
# Several tiles of queries, of keys and of head_dim; and keys that several blocks share.
LARGER = (
    Case("tiles", batch=1, heads=2, kv_heads=1, seqlen_q=131, seqlen_k=195, head_dim=64, causal=True),
    Case("tiles-wide", batch=1, heads=1, seqlen_q=67, seqlen_k=75, head_dim=200, head_dim_v=136, bias="1h1k", hiding_bias=True),
    Case("shared-keys", batch=2, heads=4, kv_heads=2, seqlen_q=3, seqlen_k=520, head_dim=128, kv_lengths=(7, 520), sinks=True),
)
PAGE_SIZES = (5, 128)  # a tile spans several, and divides one


def main(device: str, backend: str) -> None:
    if (device, backend) == ("cuda", "cuda"):
        provide_cuda()
    cases = [case for case in CASES if case.name in NAMES] + list(LARGER if backend == "cuda" else ())
    dtypes = DTYPES.get(backend, (torch.bfloat16,))
    for dtype in dtypes:
        for case in cases:
            replace(case, dtype=dtype).make(device).run(backend)
        for page_size in PAGE_SIZES:
            decode_pages(page_size, dtype, device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(dtypes) * (len(cases) + len(PAGE_SIZES))} problems ran")


def provide_cuda() -> None:
    """The kernels that the test's own process has compiled or found."""
    import cuda_module

    reason = cuda_module.provide(torch.device("cuda", 0))
    if reason is not None:
        raise SystemExit(reason)


def decode_pages(page_size: int, dtype: torch.dtype, device: str, backend: str) -> None:
    """A token of three sequences, two of them with page numbers that are none."""
    facts = {"page_size": page_size, "dtype": dtype, "device": device}
    cache = PagedKVCache(3, 3 * -(-150 // page_size), 2, 64, **facts)
    x = torch.randn(3, 2, 150, 64, dtype=dtype, device=device)
    cache.append(x, x, new_lengths=[150, 9, 131])
    cache.page_table[0, 0], cache.page_table[2, 1] = -1, 10**6
    attention_with_cache(x[:, :, :1].repeat(1, 4, 1, 1), cache, backend=backend)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda", "triton"]))
