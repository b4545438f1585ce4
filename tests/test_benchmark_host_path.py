"""The host path's benchmark times every step, and launches nothing."""

from __future__ import annotations

import pytest
from fused_attention.benchmarks import host_path

pytest.importorskip("triton", reason="triton is not installed: it belongs to the [triton] extra")


def test_every_step_is_timed():
    found = {step.name: step.microseconds for step in host_path.steps(calls=3, rounds=3)}
    assert len(found) >= 5
    assert all(time > 0 for time in found.values()), found


def test_no_kernel_is_launched(monkeypatch):
    from fused_attention.triton_kernels import launch

    def submit(*_):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch, "submit", submit)
    list(host_path.steps(calls=1, rounds=1))
