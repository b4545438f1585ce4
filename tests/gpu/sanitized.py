"""A few tiny problems, forward and backward, for compute-sanitizer to watch: it runs this file as a program.

python tests/gpu/sanitized.py [DEVICE] [BACKEND]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from fused_attention.testing import CASES

NAMES = ("base", "long-causal", "kv-range-window", "kv-untrusted", "mask-bh1k", "bias-1h11", "decode", "everything", "packed-everything")


def main(device: str, backend: str) -> None:
    cases = {case.name: case for case in CASES}
    for name in NAMES:
        replace(cases[name], dtype=torch.bfloat16).make(device).run(backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(NAMES)} problems ran")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda", "triton"]))
