"""Spares Triton's interpreter its most frequent useless work, which is half of its time here.

Before every call of a device function it patches the module triton.language that the function sees, though the launch of the kernel has
just done so, or triton.language.core, which it never restores.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patched: set[Any] = set()


def apply() -> None:
    interpreter.InterpretedFunction.__call__ = _call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.fn not in _patched:
        _patched.add(self.fn)
        if tl not in [value for value in self.fn.__globals__.values() if value is tl]:
            interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
