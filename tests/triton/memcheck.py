"""A memory check for kernels in Triton's interpreter: each load and store is held against the tensors that its launch was given.

    with memcheck() as check:
        out = attention(q, k, v, backend="triton")
        check.results(out)

Found, and raised together at the end as a MemcheckError, a sentence for each kind of fault and each line of a kernel:
out of bounds      a lane outside the elements that the view of its pointer reaches, not just outside its storage
misaligned         an address between two elements
race               an element written by one program and written or read by another, or written twice by one store with different values
uninitialised read an element of a torch.empty that nothing has been stored to
unwritten result   an element of a tensor declared a result that nothing has been stored to
write to an input  a store to a tensor that is older than the check
integer overflow   an int32 sum or product that does not fit, as in an address computed too narrowly
failed assertion   a tl.device_assert or tl.assume that does not hold
Masked lanes of a load without `other` hold poison, as they may on a GPU, not the interpreter's zeros. shuffle=seed runs the programs of
each launch in a random order, which must not change a bit. A faulty access is not carried out.

The interpreter computes with addresses of host memory. Under the check the pointer of each argument carries the argument's number in its
high bits: an access belongs to the tensor that its pointer came from, also where it strays into a neighbour.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .interpreter import require
from .shadow import BYTE_POISON, POISON, Buffer, Region, living_storages

TRITON = str(Path(triton.__file__).parent)
TAG_SHIFT = np.uint64(48)  # addresses of user space have 47 bits, which leaves as much room to stray on either side
EMPTY = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
EMPTY += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]


class MemcheckError(AssertionError):
    """The faults of all launches under one check, a sentence each."""

    def __init__(self, check: Check) -> None:
        super().__init__("\n".join(check.faults.values()))
        self.kinds = [kind for kind, _, _ in check.faults]


@contextmanager
def memcheck(shuffle: int | None = None) -> Iterator[Check]:
    """Check the launches of the block. shuffle: the seed of a random order of programs; None keeps the interpreter's own order."""
    check = Check(shuffle)
    try:
        with ExitStack() as patches:
            for owner, name, member in check.replacements():
                patches.enter_context(mock.patch.object(owner, name, member))
            yield check
    except BaseException as error:
        if check.faults:
            raise MemcheckError(check) from error
        raise
    if check.faults:
        raise MemcheckError(check)


class Check:
    """The state of a running check; `faults` maps (kind, kernel, line) to a sentence."""

    def __init__(self, shuffle: int | None) -> None:
        self.faults: dict[tuple[str, str, str], str] = {}
        self.inputs, self.buffers = living_storages(), dict[int, Buffer]()
        self.regions: list[Region] = []
        self.names: list[str] = []
        self.kernel = ""
        self.random = None if shuffle is None else np.random.default_rng(shuffle)

    def results(self, *tensors: torch.Tensor) -> None:
        """Declare tensors complete: each of their elements must have been stored to."""
        for number, tensor in enumerate(tensors):
            buffer = self.buffers.get(tensor.untyped_storage().data_ptr())
            missing = 0 if buffer is None or tensor.numel() == 0 else buffer.undefined_elements(tensor)
            if missing:
                text = f"result {number} of shape {tuple(tensor.shape)}: {missing} of {tensor.numel()} elements were never stored to"
                self.faults.setdefault(("unwritten result", str(number), ""), f"unwritten result: {text}")

    def report(self, kind: str, text: str, line: str | None = None) -> None:
        line = calling_line() if line is None else line
        builder = interpreter.interpreter_builder
        sentence = f"{kind}: {self.kernel}, program {builder.grid_idx} of {builder.grid_dim}, {line}: {text}"
        self.faults.setdefault((kind, self.kernel, line), sentence)

    # What stands in for the interpreter's own functions, and for torch's allocations.

    def replacements(self) -> list[tuple[Any, str, Any]]:
        require(interpreter, "interpreter_builder", "InterpreterBuilder", "InterpreterOptions", "GridExecutor", "_implicit_cvt")
        builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
        require(grid, "__call__")
        require(builder, "set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
        load = builder.create_masked_load
        return [
            (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)),  # else no overflow is noticed
            (interpreter, "_implicit_cvt", self.tagging(interpreter._implicit_cvt)),
            (grid, "__call__", self.launching(grid.__call__)),
            (builder, "set_grid_idx", self.shuffling(builder.set_grid_idx)),
            (builder, "create_masked_load", self.loading(load)),
            (builder, "create_masked_store", self.storing(builder.create_masked_store, load)),
            (builder, "create_atomic_rmw", self.updating(builder.create_atomic_rmw, 1)),
            (builder, "create_atomic_cas", self.updating(builder.create_atomic_cas, 0)),
            *((owner, name, self.allocating(getattr(owner, name))) for owner, name in EMPTY),
        ]

    def allocating(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*args, **options)
            # A fake tensor is of another type and has no memory.
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
                self.buffers[tensor.untyped_storage().data_ptr()] = Buffer(tensor, defined=False)
            return tensor

        return allocated

    def launching(self, run: Callable[..., None]) -> Callable[..., None]:
        def checked(executor: Any, *args: Any, **options: Any) -> None:
            given = dict(zip(executor.arg_names, args, strict=False)) | options
            variables = [name for name in executor.arg_names if name in given and name not in executor.constexprs]
            self.names = [name for variable in variables for name in tensors_in(variable, given[variable])]
            self.kernel, self.regions = executor.fn.__name__, []
            try:
                run(executor, *args, **options)
            except InterpreterError as error:
                cause, line = innermost(error)
                if not isinstance(cause, AssertionError):
                    raise
                self.report("integer overflow" if "overflow" in str(cause) else "failed assertion", str(cause), line)

        return checked

    def tagging(self, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def tagged(arg: Any) -> Any:
            value = convert(arg)
            if hasattr(arg, "data_ptr"):
                buffer = self.buffer_of(arg)
                if buffer is not None:
                    buffer.start_launch()
                self.regions.append(Region(self.names[len(self.regions)], arg, buffer))
                value.handle.data = value.handle.data + (np.uint64(len(self.regions)) << TAG_SHIFT)
            return value

        return tagged

    def buffer_of(self, tensor: torch.Tensor) -> Buffer | None:
        """None of an input, or of no elements."""
        start = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0 or start in self.inputs:
            return None
        if start not in self.buffers:  # what another operation of torch than an empty has made holds values
            self.buffers[start] = Buffer(tensor, defined=True)
        if self.buffers[start].itemsize != tensor.element_size():
            raise NotImplementedError(f"{self.kernel} takes {tensor.dtype} in memory that was allocated for another size of element")
        return self.buffers[start]

    def shuffling(self, set_grid_idx: Callable[..., None]) -> Callable[..., None]:
        order: list[int] = []

        def shuffled(builder: Any, x: int, y: int, z: int) -> None:
            if self.random is None:
                return set_grid_idx(builder, x, y, z)
            place = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
            if place == 0:
                order[:] = self.random.permutation(int(np.prod(builder.grid_dim))).tolist()
            return set_grid_idx(builder, *map(int, np.unravel_index(order[place], builder.grid_dim)))

        return shuffled

    def loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def checked(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
            pointers, lanes = self.admit("loads", ptrs, mask)
            return load(builder, pointers, lanes, poison_like(ptrs) if other is None else other, *rest, **options)

        return checked

    def storing(self, store: Callable[..., Any], load: Callable[..., Any]) -> Callable[..., Any]:
        def checked(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            pointers, lanes = self.admit("stores", ptrs, mask)
            result = store(builder, pointers, value, lanes, *rest)
            stored = load(builder, pointers, lanes, value, None, None, False).data
            if stored.tobytes() != np.broadcast_to(value.data, stored.shape).astype(stored.dtype).tobytes():
                self.report("race", "two lanes of one store write different values to an element")
            return result

        return checked

    def updating(self, update: Callable[..., Any], at: int) -> Callable[..., Any]:
        """An atomic operation, whose pointer is argument number `at`; a mask, if it takes one, is number at + 2."""

        def checked(builder: Any, *args: Any) -> Any:
            every_lane = interpreter.TensorHandle(np.ones_like(args[at].data, dtype=bool), triton.language.int1)
            pointers, lanes = self.admit("updates", args[at], args[at + 2] if at else every_lane)
            if not at and not lanes.data.all():  # this operation takes no mask
                return interpreter.TensorHandle(np.zeros_like(args[1].data), args[1].dtype.scalar)
            args = (*args[:at], pointers, *args[at + 1 :])
            return update(builder, *((*args[: at + 2], lanes, *args[at + 3 :]) if at else args))

        return checked

    # The faults themselves.

    def admit(self, verb: str, ptrs: Any, mask: Any) -> tuple[Any, Any]:
        """Real addresses, and the lanes that may use them."""
        lanes = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        tagged = ptrs.data[lanes]
        tags = tagged >> TAG_SHIFT
        addresses = (tagged - (tags << TAG_SHIFT)).view(np.int64)
        admitted = np.zeros(addresses.shape, dtype=bool)
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        for tag in tags[:1] if (tags == tags[:1]).all() else np.unique(tags):
            own = tags == tag
            if 1 <= tag <= len(self.regions):
                admitted[own] = self.admit_region(verb, self.regions[int(tag) - 1], addresses[own], itemsize)
            else:
                self.report("out of bounds", f"{verb} {own.sum()} elements at addresses that belong to no argument")
        lanes[lanes] = admitted
        data = np.zeros(lanes.shape, dtype=np.uint64)
        data[lanes] = addresses[admitted]
        return interpreter.TensorHandle(data, ptrs.dtype), interpreter.TensorHandle(lanes, mask.dtype)

    def admit_region(self, verb: str, region: Region, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        elements, rest = np.divmod(addresses - region.base, region.itemsize)
        aligned = (rest == 0) & (itemsize == region.itemsize)
        if not aligned.all():
            self.report("misaligned", f"{verb} {itemsize} bytes at {np.sum(~aligned)} addresses that are no element of {region}")
        admitted = aligned & region.reaches(elements)
        if not admitted[aligned].all():
            first = elements[aligned & ~admitted][0]
            self.report("out of bounds", f"{verb} {np.sum(aligned & ~admitted)} elements outside {region}, one of them number {first}")
        if region.buffer is not None:
            self.remember(verb, region, region.buffer, region.buffer.elements(addresses[admitted]))
        elif verb != "loads" and admitted.any():
            self.report("write to an input", f"{verb} {admitted.sum()} elements of {region}, which is older than the check")
            admitted[:] = False
        return admitted

    def remember(self, verb: str, region: Region, buffer: Buffer, elements: np.ndarray) -> None:
        if verb != "stores" and not buffer.defined[elements].all():
            self.report("uninitialised read", f"{verb} {np.sum(~buffer.defined[elements])} elements of {region} that hold no value yet")
        if verb == "loads":
            conflicts = buffer.load(elements, self.program())
        elif verb == "stores":
            conflicts = buffer.store(elements, self.program())
        else:
            return
        if conflicts.any():
            self.report("race", f"{verb} {conflicts.sum()} elements of {region} that another program writes or reads")

    def program(self) -> int:
        builder = interpreter.interpreter_builder
        return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))


def tensors_in(name: str, value: Any) -> Iterator[str]:
    """Names for the tensors of an argument, in the order in which the interpreter converts them."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for field, part in zip(fields, value, strict=True):
            yield from tensors_in(f"{name}.{field}", part)
    elif hasattr(value, "data_ptr") or hasattr(value, "base"):
        yield name


def poison_like(ptrs: Any) -> Any:
    """What a masked lane may hold on a GPU: NaN, or a large integer."""
    dtype = ptrs.get_element_ty()
    torch_dtype = getattr(torch, str(dtype).replace("fp", "float").replace("bf16", "bfloat16").replace("int1", "bool"), None)
    numpy_dtype = interpreter._get_np_dtype(dtype)
    bits = np.full(ptrs.data.shape, POISON.get(torch_dtype, BYTE_POISON), dtype=f"u{numpy_dtype.itemsize}")
    return interpreter.TensorHandle(bits.view(numpy_dtype), dtype)


def innermost(error: BaseException) -> tuple[BaseException, str]:
    """The exception that a kernel raised first, and the line of the kernel that did."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TRITON, __file__))]
    return error, f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown line"


def calling_line() -> str:
    """The innermost line outside Triton and this file: the kernel's, or that of a function it calls."""
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith((TRITON, __file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
