"""Who would compute a call of `attention`, or every such call inside a module, and why not the others.

A copy of a module is run on fake tensors, which have shapes, dtypes and devices but no data: nothing is computed, and no state changes.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import decoding, functional
from .backend import Explanation, explanation
from .cache import Cache
from .ops import forward_op, problem_of
from .problem import Gradients


@overload
def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None, **options: Any) -> Explanation: ...
@overload
def explain(q: Tensor, k: Cache, **options: Any) -> Explanation: ...
@overload
def explain(q: nn.Module, *inputs: Any, **options: Any) -> dict[str, Explanation]: ...
def explain(q: Any, *inputs: Any, **options: Any) -> Explanation | dict[str, Explanation]:
    """Which backend `attention(q, k, v, **options)` would take, and why not the others; nothing is run.

    Accepts every option of `attention`, and cu_seqlens_q, cu_seqlens_k of `attention_varlen`. With a cache in place of k and v, and the
    options of `attention_with_cache`, the same of that call; nothing is appended.

    With a module in place of q, and what it is called with, the same of every attention call that it would make: a dict by the name
    of the submodule that makes it, "name (call 2)" if it makes another. Submodules that call torch's attention are not in it. A
    causal mask counts as any mask, for its values are not read: is_causal=True explains the call that stacks make of it.
    It is a copy of the module that runs, so what forward keeps in attributes stays as it was; hooks run, and see tensors without data.

    Raises:
        NotImplementedError: the module reads values of tensors, which there are none of, or cannot be copied.
        Otherwise what the call itself would raise.
    """
    if isinstance(q, nn.Module):
        return _explain_module(q, inputs, options)
    if inputs and isinstance(inputs[0], Cache):
        return decoding.explain(q, *inputs, **options)
    return functional.explain(q, *inputs, **options)


def _explain_module(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Explanation]:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    if any(isinstance(x, Tensor) and x.is_nested for x in tree_leaves((inputs, options))):
        raise NotImplementedError("explain of a module takes no nested tensors, which cannot be without data: pass padded ones and a mask")
    replica = _replica(module)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(replica.named_parameters()), **dict(replica.named_buffers())}
    state, inputs, options = tree_map_only(Tensor, fakes.from_tensor, (state, inputs, options))
    inputs, options = tree_map_only(Cache, functools.partial(_without_data, fakes.from_tensor), (inputs, options))
    with _names_of_running_modules(module, replica) as running:
        record = _Record(running)
        try:
            with fakes, record:
                torch.func.functional_call(replica, state, inputs, options)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotImplementedError(
                f"explain runs {type(module).__name__} without data, and {running[-1] or 'the model itself'} reads values of a tensor "
                f"({error.func}), as torch's encoder does of its masks: replace_modules first, or explain its submodules"
            ) from error
    return record.found


def _replica(module: nn.Module) -> nn.Module:
    """A copy that shares every tensor with the module, so that it costs no memory, and nothing else that forward could assign to."""
    tensors = [x for each in module.modules() for x in tree_leaves(vars(each)) if isinstance(x, Tensor)]
    try:
        return copy.deepcopy(module, {id(x): x for x in tensors})
    except Exception as error:  # whatever a user's objects raise when copied
        raise NotImplementedError(
            f"explain runs a copy of {type(module).__name__}, which cannot be copied ({error}): explain its submodules"
        ) from error


def _without_data(fake: Callable[[Tensor], Tensor], cache: Cache) -> Cache:
    """A copy whose tensors have no data, for a module to append to."""
    replica = copy.copy(cache)
    for name, value in vars(cache).items():
        setattr(replica, name, fake(value) if isinstance(value, Tensor) else copy.deepcopy(value))
    return replica


class _Record(TorchDispatchMode):
    """Notes the problem of every call of the operator behind `attention`."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = running
        self.differentiable = torch.is_grad_enabled()  # the operator runs below autograd, where this is always off
        self.found: dict[str, Explanation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is forward_op:
            q, k, v, *facts, backend = args
            differentiated = zip(Gradients._fields, args, strict=False)
            needed = {name for name, x in differentiated if self.differentiable and x is not None and x.requires_grad}
            name, calls = self.running[-1], 1
            while (key := name if calls == 1 else f"{name} (call {calls})") in self.found:
                calls += 1
            self.found[key] = explanation(problem_of(q, k, v, tuple(facts), frozenset(needed)), backend)
        return func(*args, **(kwargs or {}))


@contextmanager
def _names_of_running_modules(*copies: nn.Module) -> Iterator[list[str]]:
    """The names of the submodules whose forward is running in this thread, the innermost last.

    The names are those of any copy, as a forward assigned to an instance may hold the original. Hooks for all modules leave each
    module's own alone, and hear the modules of other threads, which are none of ours.
    """
    names = {id(submodule): name for module in copies for name, submodule in module.named_modules()}
    thread = threading.get_ident()
    running: list[str] = []

    def enter(submodule: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            running.append(names.get(id(submodule), running[-1] if running else ""))

    def leave(submodule: nn.Module, _: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            running.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
