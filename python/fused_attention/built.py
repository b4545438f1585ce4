"""What the build recorded of itself: why it left a compiled module out."""

from __future__ import annotations


def build_reason(part: str) -> str | None:
    """Why `cpu` or `cuda` is not there, if the build says."""
    try:
        from ._build_info import REASONS
    except ImportError:
        return None
    reason: str | None = REASONS.get(part)
    return reason
