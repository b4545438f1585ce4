"""The calls that the experiments take: what makes a kernel fast, without the options that the product's kernels already have.

16 bits, head_dim 64, 128 or 256, any lengths, grouped heads, causal or not; scale > 0; keys and values as TMA can read them.
"""

from __future__ import annotations

from fused_attention.triton_kernels.options import Options
from torch import Tensor, bfloat16, float16

HEAD_DIMS = (64, 128, 256)
ABSENT = ("window_left", "offset", "mask", "bias", "kv_lengths", "alibi_slopes", "softcap", "sinks", "cu_seqlens_q")
TMA_BYTES = 16  # that every row of a tensor has to begin at a multiple of


def check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """NotImplementedError with a sentence where an experiment would compute something else, or not run at all."""
    given = [name for name in ABSENT if getattr(options, name) is not None] + (["dropout_p"] if options.dropout_p else [])
    if given or options.window_right not in (None, 0):
        raise NotImplementedError(f"the experiments know no {', '.join(given) or 'window on the right'}: give causal and scale alone")
    if q.dtype not in (float16, bfloat16):
        raise NotImplementedError(f"q is {q.dtype}, the experiments take float16 and bfloat16")
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        raise NotImplementedError(f"head_dim is {q.shape[-1]} and {v.shape[-1]} of v, the experiments take one of {HEAD_DIMS} for both")
    if not options.scale > 0.0:
        raise NotImplementedError(f"scale is {options.scale}, the experiments take the largest product for the largest score: give one > 0")
    for name, tensor in (("k", k), ("v", v)):
        strides = [tensor.storage_offset(), *tensor.stride()[:-1]]
        if tensor.stride(-1) != 1 or any(stride * tensor.itemsize % TMA_BYTES for stride in strides):
            raise NotImplementedError(f"{name} has strides {tensor.stride()}: TMA reads rows of unit stride that begin at 16 bytes")
    if not all(k.shape[:3]):
        raise NotImplementedError(f"k has shape {tuple(k.shape)}: TMA reads no empty tensor")
