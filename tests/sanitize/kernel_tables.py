"""The compiled module once for each instruction set that this CPU can run, all in one process.

A module chooses its table when it is first asked for it; a copy of the file is another module.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import fused_attention
from fused_attention import cpu_backend, plans

NAME = "fused_attention._cpu"
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "baseline")
VARIABLE = "FUSED_ATTENTION_CPU_ISA"


def installed() -> Path:
    return Path(importlib.import_module(NAME).__file__ or "")


def load_tables(path: Path) -> dict[str, ModuleType]:
    """The module at `path` for each instruction set; those that this CPU cannot run are left out."""
    before = os.environ.get(VARIABLE)
    tables = {}
    try:
        # The files may go as soon as they are loaded.
        with tempfile.TemporaryDirectory() as folder:
            for isa in INSTRUCTION_SETS:
                os.environ[VARIABLE] = isa
                module = load(f"{isa}._cpu", Path(shutil.copy2(path, Path(folder) / f"{isa}.so")))
                try:
                    tables[module.isa()] = module
                except RuntimeError as error:
                    if "this CPU can run" not in str(error):
                        raise
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
    return tables


def load(name: str, path: Path) -> ModuleType:
    """A module of its own: pybind11 gives a name that it knows the module that it knows."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module that Python can load")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def using(module: ModuleType) -> Iterator[None]:
    """Every call of the package's kernels goes to `module`."""
    before = importlib.import_module(NAME)
    set_module(module)
    try:
        yield
    finally:
        set_module(before)


def set_module(module: ModuleType) -> None:
    sys.modules[NAME] = module
    vars(fused_attention)["_cpu"] = module  # where `from . import _cpu` looks first
    cpu_backend._module.cache_clear()
    plans.forget()  # calls that come again are prepared with kernels of the module before
