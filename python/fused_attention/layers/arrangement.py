"""Where a layer's norms stand among its blocks, of encoder and decoder layers alike.

    post-norm:  x = norm_i(x + block_i(x))
    pre-norm:   x = x + block_i(norm_i(x))
    sandwich:   x = x + after_i(block_i(norm_i(x)))
    parallel:   x = x + block_1(norm1(x)) + block_2(norm1(x) or norm2(x))

Sources: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Xiong et al., 2020, https://arxiv.org/abs/2002.04745; blocks.py.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .blocks import LayerExtras
from .fused import add_norm_of


def arrange(layer: Any, x: Tensor, *blocks: Callable[[Tensor], Tensor]) -> Tensor:
    """x after the blocks, in their order, each with the layer's norm of its number; an addition and the norm behind it are one pass."""
    extras: LayerExtras | None = layer._fused_extras
    if extras is not None and extras.parallel is not None:
        first, second = blocks
        normed = layer.norm1(x)
        attended = first(normed)
        fed = second(normed if extras.parallel == "one_norm" else layer.norm2(x))
        if extras.sandwich:
            attended, fed = layer.after1(attended), layer.after2(fed)
        return x + attended + fed
    numbers = range(1, len(blocks) + 1)
    norms = [getattr(layer, f"norm{number}") for number in numbers]
    if extras is not None and extras.sandwich:
        for norm, block, number in zip(norms, blocks, numbers, strict=True):
            x = x + getattr(layer, f"after{number}")(block(norm(x)))
        return x
    if not layer.norm_first:
        for norm, block in zip(norms, blocks, strict=True):
            x, _ = add_norm_of(norm, x, block(x))
        return x
    normed = norms[0](x)
    for norm, block in zip(norms[1:], blocks, strict=False):
        normed, x = add_norm_of(norm, x, block(normed))
    return x + blocks[-1](normed)
