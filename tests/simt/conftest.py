"""The simulated GPU that the tests of this folder share."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from .simulation import COMPILER, ROOT, Simulation, compile_simulation


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    if not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("the CUDA sources are in a source checkout only")
    if COMPILER is None or platform.machine() != "x86_64":
        pytest.skip("the simulated GPU needs g++ on x86-64")
    return Simulation(compile_simulation(Path(tmp_path_factory.mktemp("simt"))))


@pytest.fixture
def simulation(compiled: Simulation) -> Iterator[Simulation]:
    with compiled.installed():
        yield compiled
