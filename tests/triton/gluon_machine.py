"""Runs a warp-specialised Gluon kernel's own source without a GPU: its partitions as threads, with barriers, TMA and products in flight.

    one thread at a time, chosen at random wherever it could wait      ->      any order that the barriers allow can happen

What the hardware may do at any moment between two instructions happens here at the worst one: a slot holds NaN from when a copy into it is
issued until that copy lands; a product is computed when it is waited for, and must find its operands as they were when it was issued; a
copy out of shared memory reads it late. Registers, layouts and speed are not simulated.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction


class SimulationError(Exception):
    """The kernel waits for ever, or reads what is not there yet."""


class Machine:
    """One program: its copies in flight, and the threads of its partitions, of which one runs at a time."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.copies: list[Callable[[], None]] = []
        self.own = threading.local()
        self.turn = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {}  # what each thread needs to go on
        self.running: int | None = None
        self.failure: BaseException | None = None

    def run(self, partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.waiting = dict.fromkeys(range(len(partitions)), lambda: True)
        threads = [threading.Thread(target=self._partition, args=(number, *each)) for number, each in enumerate(partitions)]
        for thread in threads:
            thread.start()
        with self.turn:
            self._choose()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _partition(self, number: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.own.number, self.own.products, self.own.stores, self.own.unfenced = number, [], [], set()
        try:
            self._wait_for_turn()
            function(*arguments)
        except BaseException as error:  # noqa: BLE001  # raised again by the thread that waits for this one
            self.failure = self.failure or error
        with self.turn:
            del self.waiting[number]
            self._choose()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let any thread go on, this one as soon as it is ready."""
        with self.turn:
            self.waiting[self.own.number] = ready
            self._choose()
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.running == self.own.number or self.failure is not None)
        if self.failure is not None:
            raise SimulationError("another partition failed")

    def _choose(self) -> None:
        while self.waiting and self.failure is None:
            able = [number for number, ready in self.waiting.items() if ready()]
            if not self.copies and not able:
                self.failure = SimulationError(f"partitions {sorted(self.waiting)} wait for ever")
            elif self.copies and (not able or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
            else:
                self.running = self.random.choice(able)
                break
        self.turn.notify_all()


class Barrier:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.arrivals = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int = 0, byte_count: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += byte_count
        if self.missing < 0:
            self.machine.failure = SimulationError("more arrivals at a barrier than it counts")
        elif self.missing == self.bytes == 0:
            self.missing, self.phase = self.arrivals, 1 - self.phase


@dataclass
class Shared:
    """A tile in shared memory, or several."""

    machine: Machine
    data: torch.Tensor

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, number: int) -> Shared:
        return Shared(self.machine, self.data[number])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.machine, self.data.permute(*order))

    def store(self, values: torch.Tensor) -> None:
        self.data.copy_(values)
        self.machine.own.unfenced.add(self.data.data_ptr())


@dataclass
class Descriptor:
    """Rows of a tensor, in tiles."""

    rows: torch.Tensor
    block: int

    def __post_init__(self) -> None:
        shape = [self.block, self.rows.shape[1]]
        self.dtype, self.layout = self.rows.dtype, None
        self.block_type = SimpleNamespace(shape=shape, nbytes=shape[0] * shape[1] * self.rows.itemsize)


@dataclass
class Pointer:
    numbers: torch.Tensor
    index: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.numbers, self.index + offset)


@dataclass
class Product:
    """A product under way."""

    operands: tuple[Shared | torch.Tensor, Shared]
    added: torch.Tensor | None
    value: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.issued = [operand.data.clone() for operand in self.operands]

    def complete(self) -> None:
        left, right = (operand.data for operand in self.operands)
        if not (torch.equal(left, self.issued[0]) and torch.equal(right, self.issued[1])):  # NaN is not equal to itself
            raise SimulationError("an operand of a product had not arrived, or was overwritten")
        product = left.float() @ right.float()
        self.value = product if self.added is None else self.added + product


class Barriers(list[Barrier]):
    def index(self, number: int) -> Barrier:  # type: ignore[override]
        return self[number]


def stand_ins(machine: Machine) -> dict[str, Any]:
    """What the kernel's module has under the names that it imports from Gluon."""

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Barriers | Shared:
        if dtype == "barriers":
            return Barriers(Barrier(machine) for _ in range(shape[0]))
        return Shared(machine, torch.full(tuple(shape), torch.nan, dtype=dtype))

    def store(pointer: Pointer, values: torch.Tensor) -> None:
        pointer.numbers[pointer.index] = values

    def init(barrier: Barrier, count: int) -> None:
        barrier.arrivals = barrier.missing = count

    def wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
        if pred:
            machine.pause(lambda: barrier.phase != phase)

    def expect(barrier: Barrier, byte_count: int) -> None:
        barrier.change(arrivals=1, byte_count=byte_count)

    def arrive(barrier: Barrier, count: int) -> None:
        barrier.change(arrivals=count)
        if hasattr(machine.own, "number"):
            machine.pause()

    def load(tensor: Descriptor, place: Sequence[int], barrier: Barrier, slot: Shared) -> None:
        def land() -> None:
            slot.data.copy_(tensor.rows[place[0] : place[0] + tensor.block])
            barrier.change(byte_count=-tensor.block_type.nbytes)

        slot.data.fill_(torch.nan)
        machine.copies.append(land)
        machine.pause()

    def send(tensor: Descriptor, place: Sequence[int], slot: Shared) -> None:
        if slot.data.data_ptr() in machine.own.unfenced:
            raise SimulationError("TMA reads shared memory behind ordinary stores without a fence")
        done: list[bool] = []

        def land() -> None:
            tensor.rows[place[0] : place[0] + tensor.block] = slot.data
            done.append(True)

        machine.copies.append(land)
        machine.own.stores.append(done)
        machine.pause()

    def await_stores(outstanding: int) -> None:
        stores = machine.own.stores
        machine.pause(lambda: sum(not done for done in stores) <= outstanding)

    def multiply(left: Any, right: Shared, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
        product = Product((left, right), acc if use_acc else None)
        machine.own.products.append(product)
        machine.pause()
        return product

    def await_products(outstanding: int, results: Sequence[Product]) -> torch.Tensor | None:
        machine.pause()
        while len(machine.own.products) > outstanding:
            machine.own.products.pop(0).complete()
        return results[0].value

    gl = SimpleNamespace(
        NVMMADistributedLayout=lambda **facts: None, SliceLayout=lambda *facts: None, DotOperandLayout=lambda *facts: None,
        float32=torch.float32, int64="barriers", program_id=lambda axis: machine.program, num_programs=lambda axis: machine.programs,
        static_range=range, arange=lambda first, last, layout: torch.arange(first, last), zeros_like=torch.zeros_like,
        zeros=lambda shape, dtype, layout: torch.zeros(shape), full=lambda shape, value, dtype, layout: torch.full(shape, value),
        where=torch.where, max=torch.amax, sum=torch.sum, maximum=torch.maximum, exp2=torch.exp2, log2=torch.log2, store=store,
        convert_layout=lambda x, layout: x, allocate_shared_memory=allocate,
        warp_specialize=lambda partitions, warps, registers: machine.run(partitions),
    )  # fmt: skip
    return {
        "gl": gl,
        "mbarrier": SimpleNamespace(MBarrierLayout=lambda: None, init=init, wait=wait, expect=expect, arrive=arrive),
        "tma": SimpleNamespace(async_copy_global_to_shared=load, async_copy_shared_to_global=send, store_wait=await_stores),
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": await_products,
        "fence_async_shared": lambda: machine.own.unfenced.clear(),
    }


def plain_python(module: ModuleType, others: dict[str, Any]) -> dict[str, Any]:
    """What a module defines, its kernels as Python functions that find `others` under their names."""
    names = {name: value.value if isinstance(value, tl.constexpr) else value for name, value in vars(module).items()} | others
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            names[name] = FunctionType(value.fn.__code__, names, name)
    return names


def launcher(module: ModuleType, seed: int) -> Callable[..., None]:
    """What stands in for `launch`: every program in turn, on tensors of the CPU."""

    def launch(kernel: JITFunction, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
        constants = {name: value for name, value in constants.items() if name.isupper()}
        given = [_without_gpu(argument) for argument in arguments]
        order = SimpleNamespace(**plain_python(module.order, {"tl": SimpleNamespace(minimum=min)}))
        for program in range(programs):
            machine = Machine(program, programs, seed + program)
            names = plain_python(module, stand_ins(machine) | {"order": order})
            names[kernel.fn.__name__](*given, **constants)
            for copy in machine.copies:
                copy()

    return launch


def _without_gpu(argument: Any) -> Any:
    if hasattr(argument, "block_shape"):
        return Descriptor(argument.base, argument.block_shape[0])
    return Pointer(argument.view(-1)) if isinstance(argument, torch.Tensor) else argument
