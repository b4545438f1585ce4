"""The checks that must notice a fault in the Triton kernels: in the interpreter, on small tiles, those that notice most first.

    prepare()                      once: what takes no kernel, the truths above all
    first_failure(copy, names)     in a fork: what the first of these units to fail says of the kernels in the folder copy, or None

A copy holds triton_kernels/ and triton_backend.py, which then stand in for those of the package.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest  # noqa: F401  # what the checks import in every fork is loaded before, once
import torch

import fused_attention
from fused_attention import backend
from fused_attention.testing import bounds
from tests.triton import interpreter, interpreter_speed

from .kernel_checks import CHECKS, check_problem, kernels
from .kernel_problems import PROBLEMS, SPLIT, TILES
from .page_checks import PAGE_CHECKS

SECONDS = 120  # of this process; a fault may make a loop endless
units: dict[str, Callable[[], None]] = {}  # everything that can notice a fault, by name; filled by prepare


def prepare() -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # faults divide by zero
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)  # which fills what is not initialised with nan
    interpreter.apply()
    interpreter_speed.apply()
    known: dict[int, dict[str, torch.Tensor]] = {}
    for case, most_rows in PROBLEMS:
        inputs = case.make()
        truth = inputs.truth()
        known[id(truth)] = bounds.tier1(truth)
        units[case.name] = partial(check_problem, inputs, truth, most_rows)
    units.update({check.__name__.removeprefix("check_"): check for check in (*CHECKS, *PAGE_CHECKS)})
    bound = bounds.tier1
    bounds.tier1 = lambda truth: known[id(truth)] if id(truth) in known else bound(truth)


def first_failure(copy: str, names: Iterable[str]) -> str | None:
    """names of units, in the order in which they run."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    name = "import"
    try:
        replace_kernels(copy)
        for name in names:
            units[name]()
    except BaseException as failure:  # noqa: BLE001  # any failure at all is what a fault is looked for by
        return f"{name}: {''.join(traceback.format_exception_only(failure)).strip()}"
    return None


def replace_kernels(copy: str) -> None:
    fused_attention.__path__.insert(0, copy)
    sys.modules.pop("fused_attention.triton_backend")
    backend.KERNELS["triton"] = importlib.import_module("fused_attention.triton_backend").TritonBackend()
    tiles = kernels("tiles")
    if not str(tiles.__file__).startswith(copy):
        raise RuntimeError(f"imported {tiles.__file__} instead of the copy in {copy}")
    tiles.choose = lambda architecture, name, *_: tiles.TileConfig(*TILES[name])
    tiles.splits_key_value = lambda *_: False
    kernels("decode").SPLIT = SPLIT
