"""Whatever tells two calls apart is in the key of each, whoever reads it, and nothing else is."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention, call_facts
from fused_attention.backend import KERNELS
from fused_attention.call_facts import _nothing, _reader, facts, listed


class Counted(torch.Tensor):
    pass


def tensor(*sizes: int, **facts_: Any) -> Tensor:
    return torch.zeros(*sizes, **facts_)


def arguments() -> list[tuple[Any, ...]]:
    """No two of which are alike."""
    x = tensor(2, 3)
    values = [None, True, False, 1, 0, 1.0, 0.5, "a", "b", "", 2**40, -1, ()]
    tensors = [
        *(x, tensor(3, 2), tensor(6), tensor(2, 3, 1), tensor(()), tensor(0, 3), tensor(3, 2).T, tensor(1, 3).expand(2, 3)),
        *(x.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.int8, torch.bool)),
        tensor(2, 3, requires_grad=True),
        tensor(2, 3, dtype=torch.float64, requires_grad=True),
    ]
    pairs = [("a", 1), ("a", (1,)), (("a",), 1), (("a", 1),), (x, None), (None, x), (x, x), ("ab", ""), ("a", "b"), ((x,),), ((), ())]
    return [*((value,) for value in values), *((value,) for value in tensors), *pairs]


READERS = {"listed": listed, "compiled": _reader(), "whichever": facts}


@pytest.fixture(params=READERS)
def reader(request):
    if READERS[request.param] is _nothing:
        pytest.skip("the compiled module is missing, or this PyTorch shows no tensor to C")
    return READERS[request.param]


def test_what_differs_has_another_key(reader):
    keys = [reader(each) for each in arguments()]
    assert None not in keys
    for (one, key), (other, second) in itertools.combinations(zip(arguments(), keys, strict=True), 2):
        assert key != second, (one, other)


def test_what_differs_in_memory_alone_has_the_same_key(reader):
    assert [reader(each) for each in arguments()] == [reader(each) for each in arguments()]
    x = torch.randn(4, 3)
    assert (
        reader((x[:2],)) == reader((x[2:],)) == reader((tensor(2, 3),)) == reader((torch.nn.Parameter(tensor(2, 3), requires_grad=False),))
    )


UNREADABLE = {
    "a list": lambda: [1],
    "a subclass": lambda: tensor(2, 3).as_subclass(Counted),
    "sparse": lambda: tensor(2, 3).to_sparse(),
    "a set inside a tuple": lambda: (1, {2}),
    "a number of its own kind": lambda: type("Number", (float,), {})(1.0),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_has_no_key(name, reader):
    assert reader((UNREADABLE[name](),)) is None


def test_what_is_too_much_for_the_compiled_reader():
    for value in (2**70, -(2**70), "a" * 3000, tensor(2, 3, device="meta")):
        assert _reader()((value,)) is None
        assert facts((value,)) == listed((value,))
    deep: tuple[Any, ...] = ()
    for _ in range(200_000):
        deep = (deep,)
    assert _reader()(deep) is None


def nested(depth: int) -> tuple[Any, ...]:
    found: tuple[Any, ...] = ()
    for _ in range(depth):
        found = (found,)
    return found


def test_what_is_nested_too_deep_is_left_to_the_checks():
    """Its key took a recursion that the interpreter refused, with an error of its own."""
    assert listed(nested(3)) == nested(3)
    assert listed(nested(5000)) is facts(nested(5000)) is None
    q = tensor(1, 1, 2, 4)
    with pytest.raises(TypeError, match="sinks is tuple"):
        attention(q, q, q, sinks=nested(5000))


def test_what_shows_its_memory_in_another_way_is_read_in_python(monkeypatch):
    """A capsule of another name, as a later version's would be."""
    name = ctypes.c_char_p(b"dlpack_exchange_api_2")
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    other = type("Other", (), {"__dlpack_c_exchange_api__": new(1, name, None)})
    monkeypatch.setattr(call_facts, "ORDINARY", frozenset((other,)))
    assert _reader.__wrapped__() is _nothing


def test_what_a_transform_wraps_is_no_matter_for_the_compiled_reader(monkeypatch):
    """It has no memory, and the error that says so takes a millisecond."""
    monkeypatch.setattr(call_facts, "_reader", None)
    seen = []
    torch.vmap(lambda x: seen.append(facts((x,))) or x)(tensor(2, 3))
    assert seen == [listed((tensor(3),))]


@pytest.mark.skipif(KERNELS["cpu"].unavailable() is not None, reason="the compiled module is missing")
def test_the_compiled_reader_is_there():
    shown = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert (_reader() is not _nothing) == shown
    with pytest.raises(AttributeError):  # which _reader takes for an older PyTorch
        importlib.import_module("fused_attention._cpu").call_facts((int,))
