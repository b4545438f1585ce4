"""Who computes a layer's operation: a kernel behind its registered operator, or plain PyTorch.

cpu     float32 tensors on a CPU, where the C++ kernels are built
triton  floating tensors on a GPU, where Triton runs
None    everything else: other types and devices, autocast, functional transforms, forward-mode derivatives, export
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_attention.cpu_backend import CpuBackend
from fused_attention.listeners import unheard
from fused_attention.triton_backend import TritonBackend

Kernel = Literal["cpu", "triton"]

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_for(*given: Tensor | None) -> Kernel | None:
    """The kernels that take tensors of these types and devices, all alike, or None for plain PyTorch."""
    first = next(tensor for tensor in given if tensor is not None)
    if not untouched(*given):
        return None
    if first.dtype is torch.float32 and first.device.type == "cpu":
        return "cpu" if _ready("cpu") else None
    if first.dtype in TRITON_DTYPES and first.device.type == "cuda":
        return "triton" if _ready("triton") else None
    return None


def untouched(*given: Tensor | None) -> bool:
    """Whether all are plain dense tensors of one type on one device, and nothing is on that only plain PyTorch can go through."""
    first, *others = (tensor for tensor in given if tensor is not None)
    dense = all(type(x) in PLAIN and x.layout is torch.strided and not x.is_nested for x in (first, *others))
    alike = all(x.dtype is first.dtype and x.device == first.device for x in others)
    return dense and alike and not _transformed(first.device.type)


PLAIN = (Tensor, torch.nn.Parameter)  # a subclass has its own idea of what an operation means


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def heard(*tensors: Tensor | None) -> bool:
    """Whether the operator is needed: by a compiler, for a gradient, or by anybody else but the kernel who would notice it."""
    return torch.compiler.is_compiling() or needs_gradient(*tensors) or not unheard(*tensors)


def _transformed(device_type: str) -> bool:
    """Whether something is on that plain PyTorch knows how to go through, and an operator of ours does not."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler can't trace into compiled modules
def _ready(kernel: Kernel) -> bool:
    if kernel == "triton":
        return TritonBackend().unavailable() is None
    if CpuBackend().unavailable() is not None:
        return False
    from fused_attention import _cpu

    return _cpu.isa() != "baseline"  # four lanes are no faster than PyTorch's own


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def products_pay() -> bool:
    """Whether the C++ product is faster than PyTorch's with the instruction set in use."""
    from fused_attention import _cpu

    return _cpu.isa().startswith("avx512")
