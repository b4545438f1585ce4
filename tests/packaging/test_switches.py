"""The environment variables of a build: an unknown value, or a demand that can't be met, ends it with a sentence."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SWITCHES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "build_tools" / "switches.py"))


@pytest.mark.parametrize("given", [None, "", "auto"])
def test_a_switch_that_is_not_set_has_its_first_value(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_ATTENTION_CPU", raising=False)
    if given is not None:
        monkeypatch.setenv("FUSED_ATTENTION_CPU", given)
    assert SWITCHES["switch"]("FUSED_ATTENTION_CPU", ("auto", "1", "0")) == "auto"


@pytest.mark.parametrize("given", ["yes", "AUTO", "2", " "])
def test_an_unknown_value_ends_the_build(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CPU", given)
    with pytest.raises(SystemExit, match=f"FUSED_ATTENTION_CPU is '{given}': set it to one of auto, 1, 0"):
        SWITCHES["switch"]("FUSED_ATTENTION_CPU", ("auto", "1", "0"))


@pytest.mark.parametrize("given", ["1", "pypi"])
def test_demanding_cuda_ends_the_build(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", given)
    with pytest.raises(SystemExit, match=f"FUSED_ATTENTION_CUDA={given} demands the CUDA extension, but .* has no CUDA sources"):
        SWITCHES["refuse_cuda"]()


@pytest.mark.parametrize("given", ["auto", "0"])
def test_cuda_is_left_out_with_its_reason(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", given)
    assert "has no CUDA sources" in SWITCHES["refuse_cuda"]()
