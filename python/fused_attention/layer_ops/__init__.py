"""The operations of a layer beside attention, fused: one pass over memory each, forward and backward, on whatever kernel serves best.

    linear     act(x weight' + bias) + residual
    add_norm   norm(x + residual) weight + bias
    gated      act(gate) · value
    rotate     pairs of elements, turned by an angle of their position

Each chooses by tensors alone: the C++ kernels for fp32 on CPUs, Triton's on GPUs, and plain PyTorch elsewhere and where that is faster.
"""

from .gate import gated
from .norm import AddNorm, add_norm
from .projection import linear
from .rotation import rotate

__all__ = ["AddNorm", "add_norm", "gated", "linear", "rotate"]
