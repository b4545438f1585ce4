"""The environment variables of a build: an unknown value, or a demand that can't be met, ends it with a sentence."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SWITCHES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "build_tools" / "switches.py"))


@pytest.mark.parametrize(("part", "first"), [("cpu", "auto"), ("cuda", "0")])
@pytest.mark.parametrize("given", [None, ""])
def test_a_switch_that_is_not_set_has_its_first_value(part: str, first: str, given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = SWITCHES["variable"](part)
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    assert SWITCHES["switch"](name) == first
    assert not SWITCHES["is_demanded"](part)


@pytest.mark.parametrize("given", ["yes", "AUTO", "2", " ", "pypi"])
def test_an_unknown_value_ends_the_build(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CPU", given)
    with pytest.raises(SystemExit, match=f"FUSED_ATTENTION_CPU is '{given}': set it to one of auto, 1, 0"):
        SWITCHES["switch"]("FUSED_ATTENTION_CPU")


@pytest.mark.parametrize(("given", "demanded"), [("1", True), ("pypi", True), ("0", False), ("auto", False)])
def test_what_demands_a_part(given: str, demanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", given)
    assert SWITCHES["is_demanded"]("cuda") is demanded
