"""Who computes a problem: the backends, why one can't, which is chosen, and the sentences that say so.

The reasons of `unavailable`, `unsupported` and `slower` are the dispatch rule and the text of errors, tests, tables and `explain` alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .cpu_backend import CpuBackend, out_alone
from .cuda_backend import CudaBackend
from .problem import AttentionOutput, Gradients, Problem
from .torch_backend import TorchBackend
from .triton_backend import TritonBackend


class KernelBackend(Protocol):
    """An implementation behind the registered operators."""

    @property
    def name(self) -> str: ...

    def unavailable(self) -> str | None:
        """Why this machine can't run it (build, driver, device), or None."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why it can't compute the problem with the gradients it needs, or None; a pure function of the problem."""

    def slower(self, problem: Problem) -> str | None:
        """Why another backend is the better choice; only the automatic choice asks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> AttentionOutput:
        """out laid out as problem.empty_output, lse contiguous and in the accumulate dtype."""

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
    ) -> Gradients:
        """Gradients for what problem.gradients names; others may be None."""


REFERENCE = "reference"  # no kernel: plain PyTorch that autograd differentiates by itself

KERNELS: dict[str, KernelBackend] = {
    "triton": TritonBackend(),
    "cuda": CudaBackend(),
    "cpu": CpuBackend(),
    "torch": TorchBackend(),
}

# forward without lse, of those to which that is less work.
OUT_ALONE: dict[str, Callable[[Tensor, Tensor, Tensor, Problem], Tensor]] = {"cpu": out_alone}

ORDER = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}  # of the automatic choice, by device type
ELSEWHERE = ("torch",)


def backends() -> dict[str, str | None]:
    """Every backend: None if this machine can run it, otherwise the reason in a sentence."""
    return {name: kernel.unavailable() for name, kernel in KERNELS.items()} | {REFERENCE: None}


def unable(name: str, problem: Problem) -> str | None:
    """Why a backend can't compute the problem on this machine, or None."""
    if name == REFERENCE:
        return None
    return _unavailable(name) or KERNELS[name].unsupported(problem)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler can't trace into compiled modules
def _unavailable(name: str) -> str | None:
    return KERNELS[name].unavailable()


def choose(problem: Problem, requested: str | None) -> str:
    """The requested backend, or the first of the automatic order that can and should compute the problem.

    Raises ValueError for an unknown name and NotImplementedError with the reason where the requested one can't run.
    """
    if requested is None:
        candidates = ORDER.get(problem.device.type, ELSEWHERE)
        able = (name for name in candidates if unable(name, problem) is None)
        slow = []
        for name in able:
            if KERNELS[name].slower(problem) is None:
                return name
            slow.append(name)
        return slow[0]
    if requested != REFERENCE and requested not in KERNELS:
        raise ValueError(f"backend is {requested!r}, expected one of {', '.join(map(repr, (*KERNELS, REFERENCE)))}, or None to choose")
    reason = unable(requested, problem)
    if reason is not None:
        raise NotImplementedError(f"backend={requested!r} can't run this call: {reason}")
    return requested


@dataclass(frozen=True)
class Explanation:
    """The backend a call would take, and for every backend why it can't or shouldn't (None: it could)."""

    backend: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        lines += [f"  {name}: {reason or 'can run this call'}" for name, reason in self.reasons.items() if name != self.backend]
        return "\n".join(lines)


def explanation(problem: Problem, requested: str | None) -> Explanation:
    reasons = {name: unable(name, problem) or kernel.slower(problem) for name, kernel in KERNELS.items()} | {REFERENCE: None}
    return Explanation(choose(problem, requested), reasons)
