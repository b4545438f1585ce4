"""Whether anybody but a kernel would notice an operator: else its dispatch, a good part of a short call's time, can be left out.

Whoever would is seen in dispatch keys (wrappers, tracers, modes, views that negate, tensors of zeros without memory), or by its own switch.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .problem import ORDINARY


def unheard(*arguments: Any) -> bool:
    """arguments: of the operator, tensors among them; none needs a gradient."""
    if forward_ad._current_level >= 0 or torch.autograd.profiler._is_profiler_enabled or torch._C._is_torch_function_mode_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & LOUD:
        return False
    keys = torch._C._dispatch_keys
    for x in arguments:
        if type(x) in ORDINARY:
            if keys(x).raw_repr() not in PLAIN:
                return False
        elif isinstance(x, Tensor):
            return False
    return True


def _key_set(*keys: str) -> int:
    return int(functools.reduce(operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr() for key in keys)))


# What the keys of a tensor can be, and those of a thread can not, where nothing is special about it. Inference tensors have but two.
PLAIN = frozenset(
    _key_set(device, f"Autocast{device}", *more) for device in ("CPU", "CUDA") for more in ((), (f"Autograd{device}", "ADInplaceOrView"))
)
LOUD = ~_key_set("BackendSelect", "ADInplaceOrView")
