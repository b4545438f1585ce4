"""The environment variables that steer a build, each checked against the values it knows."""

from __future__ import annotations

import os


def switch(name: str, values: tuple[str, ...]) -> str:
    """The value of an environment variable; unset or empty means the first of `values`, an unknown one ends the build."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise SystemExit(f"{name} is {value!r}: set it to one of {', '.join(values)}, or leave it unset for {values[0]}")
    return value


def refuse_cuda() -> str:
    """Why there is no CUDA extension, in a sentence; ends the build if one was demanded."""
    reason = "this version of fused-attention has no CUDA sources"
    if switch("FUSED_ATTENTION_CUDA", ("auto", "1", "0", "pypi")) in ("1", "pypi"):
        raise SystemExit(f"FUSED_ATTENTION_CUDA={os.environ['FUSED_ATTENTION_CUDA']} demands the CUDA extension, but {reason}: unset it")
    return reason
