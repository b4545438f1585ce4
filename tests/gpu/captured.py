"""Calls whose kernels have not run before, captured into graphs: the first call on a device has loaded every kernel.

python tests/gpu/captured.py
"""

from __future__ import annotations

import cuda_module
import torch

from fused_attention import cuda_backend
from fused_attention.backend import KERNELS
from fused_attention.testing import Case
from fused_attention.validation import check

SHAPE = {"heads": 4, "kv_heads": 2, "seqlen_q": 131, "seqlen_k": 259}
FIRST = Case("first", **SHAPE, head_dim=64, dtype=torch.float16)
NEW = (
    Case("plain", **SHAPE, head_dim=128, causal=True, dtype=torch.bfloat16),
    Case("options", **SHAPE, head_dim=256, bias="1hqk", mask="b11k", dtype=torch.bfloat16),
    Case("float32", **SHAPE, head_dim=64, alibi_slopes="h", softcap=20.0, dtype=torch.float32),
    Case("decode", **(SHAPE | {"seqlen_q": 1, "seqlen_k": 4099}), head_dim=128, dtype=torch.bfloat16),
)


def main() -> None:
    device = torch.device("cuda", 0)
    reason = cuda_module.provide(device)
    if reason is not None:
        raise SystemExit(reason)
    run(FIRST, device)
    torch.cuda.synchronize()
    for case in NEW:
        inputs = case.make(device)
        problem = check(inputs.q, inputs.k, inputs.v, **inputs.options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = KERNELS["cuda"].forward(inputs.q, inputs.k, inputs.v, problem)
        graph.replay()
        torch.cuda.synchronize()
        expected = KERNELS["cuda"].forward(inputs.q, inputs.k, inputs.v, problem)
        if not (torch.equal(got.out, expected.out) and torch.equal(got.lse, expected.lse)):
            raise SystemExit(f"{case.name}: the graph does not compute what a call does")
    print(f"{len(NEW)} calls were captured, of {len(cuda_backend._module().kernels())} kernels")


def run(case: Case, device: torch.device) -> None:
    inputs = case.make(device)
    KERNELS["cuda"].forward(inputs.q, inputs.k, inputs.v, check(inputs.q, inputs.k, inputs.v, **inputs.options))


if __name__ == "__main__":
    main()
