"""torch.func.vmap over an operator: the new dimension is folded into batch, or the operator runs once an element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTION_TENSORS = 9  # bias ... cu_seqlens_k in the operators' schemas


def batched(operator: Callable[..., tuple[Tensor, ...]], first_option: int) -> Callable[..., Any]:
    """The vmap rule of an operator whose options begin at an argument: they may be shared, so only calls without any are folded."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        tensors = [x for x in arguments[first_option : first_option + OPTION_TENSORS] if isinstance(x, Tensor)]
        if tensors:
            each = [operator(*(_element(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True))) for i in range(size)]
            outputs = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        else:
            folded = operator(*(_fold(x, dim, size) for x, dim in zip(arguments, in_dims, strict=True)))
            outputs = tuple(x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, *x.shape) for x in folded)
        return outputs, (0,) * len(outputs)

    return rule


def _element(argument: Any, dim: int | None, index: int) -> Any:
    return argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument


def _fold(argument: Any, dim: int | None, size: int) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    stacked = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
    return stacked.flatten(0, 1)
