"""The tests that all backends share, on the simulated GPU.

python -m tests.simt.shared [--library FILE] [--dtype TYPE] [TEST ...] [OPTIONS OF PYTEST]        without tests: all of them, for minutes
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from fused_attention.cuda_backend import CudaBackend
from fused_attention.testing import Case, Inputs

from .simulation import ROOT, Simulation, compile_simulation

FILES = ("test_adversarial", "test_exact_properties", "test_gradient_laws", "test_corners")
IN_FLOAT32 = ("test_bounded_properties",)  # whose bounds are of operands that no type of 16 bits holds
_ROUNDED = "of each factor of a float32 product tensor cores see 22 bits or 23, so that 1 * v is not v"
_OWN_TYPE = "the test makes values of float32, and a call has one type"
EXCEPTIONS: dict[torch.dtype, dict[str, str]] = {
    torch.float32: {"test_tier0_one_winner_takes_its_value[cuda]": _ROUNDED},
    torch.bfloat16: {f"test_values[cuda-values-alternate-{causal}]": _OWN_TYPE for causal in (False, True)},
}


class OnTheSimulatedGpu:
    """Of the tests that name a backend those of cuda, and only these."""

    def __init__(self, exceptions: dict[str, str]) -> None:
        self.exceptions = exceptions

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        own = [item for item in items if "cuda" in getattr(getattr(item, "callspec", None), "params", {}).values()]
        config.hook.pytest_deselected(items=[item for item in items if item not in own])
        items[:] = own
        for item in own:
            if item.name in self.exceptions:
                item.add_marker(pytest.mark.xfail(reason=self.exceptions[item.name], strict=True))


@contextlib.contextmanager
def made_in(dtype: torch.dtype):
    """Cases that name no type are of this one."""
    make = Case.make

    def make_in(case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = dtype, seed: int = 0) -> Inputs:
        return make(case, device, dtype, seed)

    with mock.patch.object(Case, "make", make_in):
        yield


def run(library: Path, dtype: torch.dtype, arguments: list[str]) -> int:
    files = FILES + (IN_FLOAT32 if dtype is torch.float32 else ())
    tests = arguments if any("test_" in argument for argument in arguments) else [*(f"tests/{name}.py" for name in files), *arguments]
    plugin = OnTheSimulatedGpu(EXCEPTIONS.get(dtype, {}))
    # Nobody's choice: the tests name the backend.
    with Simulation(library).installed(), mock.patch.object(CudaBackend, "slower", return_value=None), made_in(dtype):
        return int(pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *tests], plugins=[plugin]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--dtype", default="float32")
    own, others = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run(own.library or compile_simulation(Path(folder)), getattr(torch, own.dtype), others)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
