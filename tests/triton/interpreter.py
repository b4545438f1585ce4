"""Teaches Triton's interpreter bfloat16, which it holds as 16-bit integers: casts round to nearest even, dots multiply values.

    bits(float32) = bits(bfloat16) << 16        bits(bfloat16) = (bits(float32) + 0x7fff + (bits(float32) >> 16 & 1)) >> 16

As shipped (triton 3.6 and 3.7) a cast truncates and a dot, like any other arithmetic, takes the bits for whole numbers. Arithmetic other
than a dot is refused here: kernels compute in float32. The names used are private to Triton, hence the check that they are there, and a
test that the correction is still needed. Triton 3.6 besides learns to take a number of run time for one under any NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

QUIET_NAN = 0x7FC0
_shipped: dict[tuple[Any, str], Callable[..., Any]] = {}


def apply() -> None:
    """Correct the interpreter of this process; a second call changes nothing."""
    if _shipped:
        return
    require(interpreter, "InterpreterBuilder", "TensorHandle")
    builder = interpreter.InterpreterBuilder
    _replace(interpreter, "_convert_float", _converting)
    _replace(interpreter, "_patch_lang_tensor", _indexing)
    _replace(builder, "cast_impl", _casting)
    _replace(builder, "create_dot", _multiplying)
    for name in ("create_fma", "create_clampf", "binary_op", "unary_op"):
        _replace(builder, name, _refusing_bfloat16)


def remove() -> None:
    """Leave the interpreter as it was shipped, to see what it does."""
    for (owner, name), member in _shipped.items():
        setattr(owner, name, member)
    _shipped.clear()


def _replace(owner: Any, name: str, corrected: Callable[[Any], Any]) -> None:
    require(owner, name)
    _shipped[owner, name] = getattr(owner, name)
    setattr(owner, name, corrected(getattr(owner, name)))


def require(owner: Any, *names: str) -> None:
    """A sentence if Triton has renamed what the tools of this folder stand on."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"triton {triton.__version__} has no {', '.join(missing)} in {getattr(owner, '__name__', type(owner).__name__)}, "
            "a private name that tests/triton relies on: read triton/runtime/interpreter.py and adapt the tools to it"
        )


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # The sum would carry a NaN's low bits into its exponent and sign.
    nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), QUIET_NAN, nearest).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _converting(convert: Callable[..., Any]) -> Callable[..., Any]:
    def corrected(values: np.ndarray, from_type: tl.dtype, to_type: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            return rounded(values)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return widened(values)
        return convert(values, from_type, to_type, rounding_mode)

    return corrected


def _casting(cast: Callable[..., Any]) -> Callable[..., Any]:
    def corrected(builder: Any, value: Any, to_type: tl.dtype) -> Any:
        if to_type.scalar == tl.bfloat16 and value.dtype.scalar != tl.float32:
            raise TypeError(f"the interpreter casts {value.dtype.scalar} to bfloat16 wrongly: cast to float32 first")
        return cast(builder, value, to_type)

    return corrected


def _multiplying(dot: Callable[..., Any]) -> Callable[..., Any]:
    def operand(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widened(handle.data), tl.float32)

    return lambda builder, a, b, *rest: dot(builder, operand(a), operand(b), *rest)


def _refusing_bfloat16(operation: Callable[..., Any]) -> Callable[..., Any]:
    def corrected(builder: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, interpreter.TensorHandle) and operand.dtype.scalar == tl.bfloat16:
                raise TypeError("the interpreter would compute with the bits of a bfloat16, not its value: cast to float32 first")
        return operation(builder, *operands)

    return corrected


def _indexing(patch: Callable[..., Any]) -> Callable[..., Any]:
    def corrected(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 passes int() an array of one element, which NumPy deprecates and since 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    return corrected
