"""How an operation is registered: one operator for its kernels, so that autograd and torch.compile see it whoever computes it.

The first derivative is another operator. Where a derivative is to be differentiated again, plain PyTorch computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("fused_attention", "FRAGMENT")

Gradients = tuple[Any, ...]  # one for each argument of the operator, None where there is none


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of a schema, on every device: the kernel chooses by its tensors."""
    library.define(schema)
    name = schema.partition("(")[0]
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attention::{name}", fake, lib=library)
    return getattr(torch.ops.fused_attention, name).default


def differentiate(name: str, save: Callable[..., None], backward: Callable[..., Gradients]) -> None:
    """save(ctx, inputs, output) keeps what backward(ctx, *gradients) needs."""
    torch.library.register_autograd(f"fused_attention::{name}", backward, setup_context=save, lib=library)


def through_plain(outputs: Sequence[Tensor], douts: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of outputs that plain PyTorch computed, for each input that needs one, and differentiable themselves."""
    pairs = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if dout is not None]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad([out for out, _ in pairs], wanted, [dout for _, dout in pairs], create_graph=True, allow_unused=True)
        if pairs and wanted
        else ()
    )
    return [next(found, None) if x is not None and x.requires_grad else None for x in inputs]
