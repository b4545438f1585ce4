"""The interpreter's bfloat16 equals torch's with the correction, and still needs it without."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from . import interpreter

BLOCK = 1 << 16
STILL_NEEDED = "the interpreter as shipped is right now: the correction can go"


@triton.jit
def cast_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def add_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at)
    tl.store(target + at, values + values)


@triton.jit
def select_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at)
    tl.store(target + at, tl.where(at % 2 == 0, values, tl.load(source + at + BLOCK)))


@triton.jit
def loop_kernel(target, first, last):
    total = 0
    for number in range(first, last):
        total += number
    for number in tl.range(tl.minimum(first, last), last):
        total += number
    tl.store(target, total)


@pytest.fixture(params=["corrected", "as shipped"])
def corrected(request):
    if request.param == "corrected":
        yield True
        return
    interpreter.remove()
    yield False
    interpreter.apply()


def every_rounding() -> torch.Tensor:
    """float32 numbers around every bfloat16: exact, just above, just below, at and above the tie, just below the next one."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = high + np.array([[0], [1], [0x7FFF], [0x8000], [0x8001], [0xFFFF]], dtype=np.uint32)
    return torch.from_numpy(bits.reshape(-1).view(np.float32))


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit, but a NaN equals any other: torch itself has several."""
    nan = torch.isnan(expected)
    whole = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return torch.equal(torch.isnan(got), nan) and torch.equal(got[~nan].view(whole), expected[~nan].view(whole))


def test_a_cast_to_bfloat16_rounds_as_torch_does(corrected):
    source = every_rounding()
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    cast_kernel[(6,)](source, target, BLOCK)
    assert same(target, source.bfloat16()) == corrected, STILL_NEEDED


def test_a_cast_from_bfloat16_is_exact():
    source = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    target = torch.empty(source.shape)
    cast_kernel[(1,)](source, target, BLOCK)
    assert same(target, source.float())


def test_a_dot_of_bfloat16_multiplies_values(corrected):
    torch.manual_seed(0)
    a, b, out = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16(), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32)
    exact = a.double() @ b.double()
    # A product of two bfloat16 is exact in float32: all that rounds is a sum of 32 of them.
    bound = 32 * 2**-24 * (a.double().abs() @ b.double().abs())
    assert bool(((out.double() - exact).abs() <= bound).all()) == corrected, STILL_NEEDED


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dots_of_other_dtypes_are_left_alone(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    out = torch.empty(16, 16, dtype=torch.promote_types(dtype, torch.float32))
    dot_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.to(out.dtype) @ b.to(out.dtype))


def test_arithmetic_on_bfloat16_is_refused(corrected):
    source, target = torch.ones(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
    if corrected:
        with pytest.raises(InterpreterError, match="cast to float32 first"):
            add_kernel[(1,)](source, target, 8)
    else:
        add_kernel[(1,)](source, target, 8)
        assert not torch.equal(target, source + source), STILL_NEEDED


def test_a_choice_between_bfloat16_is_no_arithmetic():
    source, target = torch.randn(16).bfloat16(), torch.empty(8, dtype=torch.bfloat16)
    select_kernel[(1,)](source, target, 8)
    assert torch.equal(target, torch.where(torch.arange(8) % 2 == 0, source[:8], source[8:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_cast_that_the_interpreter_gets_wrong_is_refused(dtype):
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        cast_kernel[(1,)](torch.ones(BLOCK, dtype=dtype), torch.empty(BLOCK, dtype=torch.bfloat16), BLOCK)


def test_a_loop_may_end_at_a_number_of_run_time():
    target = torch.zeros(1, dtype=torch.int32)
    loop_kernel[(1,)](target, 3, 7)
    assert target.item() == 2 * (3 + 4 + 5 + 6)


def test_correcting_twice_is_correcting_once():
    interpreter.apply()
    interpreter.apply()
    source, target = torch.full((BLOCK,), 1.005859375), torch.empty(BLOCK, dtype=torch.bfloat16)
    cast_kernel[(1,)](source, target, BLOCK)
    assert same(target, source.bfloat16())
    interpreter.remove()
    try:
        assert triton.runtime.interpreter._convert_float.__module__ == "triton.runtime.interpreter"
    finally:
        interpreter.apply()


def test_a_name_that_triton_renamed_is_named():
    with pytest.raises(RuntimeError, match=r"has no _convert_floats in triton\.runtime\.interpreter"):
        interpreter.require(triton.runtime.interpreter, "_convert_float", "_convert_floats")
