"""The environment variables that steer a build, each checked against the values it knows."""

from __future__ import annotations

import os

# auto: build the part if that can be done. 1: or fail. 0: leave it out. pypi: build it with the compiler that PyPI has, or fail.
# The CUDA kernels take minutes to compile and have not yet run on a GPU, so nobody gets them unasked.
VALUES = {"FUSED_ATTENTION_CPU": ("auto", "1", "0"), "FUSED_ATTENTION_CUDA": ("0", "auto", "1", "pypi")}


def switch(name: str) -> str:
    """The value of an environment variable; unset or empty means the first that it knows, an unknown one ends the build."""
    values = VALUES[name]
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise SystemExit(f"{name} is {value!r}: set it to one of {', '.join(values)}, or leave it unset for {values[0]}")
    return value


def variable(part: str) -> str:
    return f"FUSED_ATTENTION_{part.upper()}"


def is_demanded(part: str) -> bool:
    """Whether the build has to fail where it can't make a part."""
    return switch(variable(part)) in ("1", "pypi")
