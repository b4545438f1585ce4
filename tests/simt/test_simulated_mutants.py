"""The simulated GPU sees what it should: faults that leave the numbers right, or nearly; the whole list runs under `make mutants`."""

from __future__ import annotations

import pytest

from .faults import FAULTS, QUICK
from .mutants import verdicts
from .simulation import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def noticed(compiled) -> dict[str, str | None]:
    return dict(verdicts(QUICK))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_planted_exactly_once(name):
    path = ROOT / "csrc" / "cuda" / FAULTS[name].file
    if not path.exists():
        pytest.skip("the CUDA sources are in a source checkout only")
    assert path.read_text().count(FAULTS[name].old) == 1


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_noticed(name, noticed):
    verdict = noticed[name]
    assert verdict is not None, f"nothing noticed {FAULTS[name]}"
    assert "the machine found" in verdict or "bound" in verdict, f"the fault is not one of the kernels: {verdict}"
