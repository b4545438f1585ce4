"""The CUDA kernels beside Triton's and beside torch's own CUDA runtime; that they compute right, the other files show for them too."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fused_attention import cuda_backend
from fused_attention.backend import KERNELS
from fused_attention.testing import Case, check
from fused_attention.validation import check as problem_of

from .target import Target, at_size

SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 2, "seqlen_q": 131, "seqlen_k": 259, "dtype": torch.bfloat16}
CASES = (
    Case("causal-64", **SHAPE, head_dim=64, causal=True),
    Case("full-128", **SHAPE, head_dim=128),
    Case("window-sinks-256", **SHAPE, head_dim=256, causal=True, window=(100, None), sinks=True),
    Case("bias-mask", **SHAPE, head_dim=64, bias="1hqk", mask="b11k"),
    Case("alibi-softcap-dropout", **SHAPE, head_dim=64, alibi_slopes="h", softcap=20.0, dropout_p=0.1),
    Case("kv-lengths", **SHAPE, head_dim=64, kv_lengths=(259, 100)),
    Case("few-queries", **(SHAPE | {"seqlen_q": 3, "seqlen_k": 1031}), head_dim=64),
    Case("float32", **(SHAPE | {"dtype": torch.float32}), head_dim=64, causal=True),
    Case("float16", **(SHAPE | {"dtype": torch.float16}), head_dim=128, causal=True),
    Case("packed", heads=4, kv_heads=2, lengths_q=(131, 0, 64, 7), head_dim=64, causal=True, dtype=torch.bfloat16),
)  # fmt: skip
CALLS, ROUNDS = 200, 5


@pytest.fixture
def cuda(gpu: Target) -> Target:
    if gpu.backend != "cuda":
        pytest.skip("FUSED_ATTENTION_GPU_BACKEND=cuda runs this")
    return gpu


@pytest.mark.parametrize("forward_is_ours", [True, False], ids=["cuda-triton", "triton-cuda"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward_may_come_from_two_backends(case: Case, forward_is_ours: bool, machine: Target) -> None:
    """lse, dropout and every option mean the same in both; in a rehearsal both are one."""
    if machine.backend not in ("cuda", *(("cpu",) if machine.rehearsed else ())):
        pytest.skip("FUSED_ATTENTION_GPU_BACKEND=cuda runs this")
    ours, other = KERNELS[machine.backend], KERNELS[machine.backend if machine.rehearsed else "triton"]
    first, second = (ours, other) if forward_is_ours else (other, ours)
    inputs = at_size(case, machine).make(machine.device)
    wanted = {"q", "k", "v"} | {name for name in ("bias", "alibi_slopes", "sinks") if name in inputs.options}
    names = {"cu_seqlens_k": inputs.options.get("cu_seqlens_k", inputs.options["cu_seqlens_q"])} if inputs.packed else {}
    problem = problem_of(inputs.q, inputs.k, inputs.v, **(inputs.options | names))._replace(gradients=frozenset(wanted))
    out, lse = first.forward(inputs.q, inputs.k, inputs.v, problem)
    gradients = second.backward(inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, problem)
    found = {"out": out, "lse": lse} | {f"d{name}": x for name, x in gradients._asdict().items() if x is not None}
    assert len(found) == 2 + len(wanted)
    check(found, inputs.truth())


def test_two_cuda_runtimes_share_a_process(cuda: Target) -> None:
    """Ours is linked statically: torch's sees neither its errors nor its kernels, and they share memory and streams."""
    inputs = CASES[0].make(cuda.device)
    x = torch.randn(256, 256, device=cuda.device)
    product = x @ x
    expected = inputs.run("cuda")
    nothing = (0, 2, 0, 0, 0, 0)
    too_many = (2**16, 2**10, 2**10, 2**12, 2**12, 64, 64, 0, 0, 1.0)
    call = ((nothing,) * 4 + (0, 0, 0), too_many, (-1, -1, 0, 0, 0, 0, 0, 0), None, 0, 0)
    with pytest.raises(RuntimeError, match=r"forward pass of a batch of 65536, q 1024 heads of 4096 rows .* did not start: cudaError"):
        cuda_backend._module().forward(*call)
    torch.cuda.synchronize()
    assert torch.equal(x @ x, product)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in inputs.run("cuda").items())


def test_kernels_that_never_ran_are_captured(cuda: Target) -> None:
    program = Path(__file__).with_name("captured.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calls were captured" in done.stdout


def test_what_a_call_costs_the_host(cuda: Target, record_property: Callable[[str, object], None]) -> None:
    """Microseconds of the backend alone, and of the whole call, for the record."""
    inputs = Case("short", heads=8, seqlen_q=16, seqlen_k=16, head_dim=64, dtype=torch.bfloat16).make(cuda.device)
    problem = problem_of(inputs.q, inputs.k, inputs.v)

    def microseconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - start) / CALLS * 1e6)
        return median(times)

    with torch.no_grad():
        record_property("backend_microseconds", microseconds(lambda: KERNELS["cuda"].forward(inputs.q, inputs.k, inputs.v, problem)))
        record_property("call_microseconds", microseconds(lambda: inputs.run("cuda", backward=False)))
    check(inputs.run("cuda"), inputs.truth())
