"""Imports go down only: the edges that the modules of fused_attention have, and a check that reads every import and finds just these.

layers -> functional -> ops -> backend -> triton_backend, cuda_backend, cpu_backend, torch_backend;
triton_backend -> triton_kernels, torch_backend -> blockwise -> scores -> dropout, problem
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fused_attention": ROOT / "python" / "fused_attention"} | {
    f"fused_attention.{name}": ROOT / name for name in ("benchmarks", "triton_kernels") if (ROOT / name).is_dir()
}

# What a module, or any module of a sub-package, may import of the others when it is loaded. "fused_attention" is the public surface.
ALLOWED: dict[str, set[str]] = {
    "problem": set(),
    "autocast": set(),
    "dropout": set(),
    "validation": {"problem"},
    "scores": {"dropout", "problem"},
    "reference": {"problem", "scores"},
    "blockwise": {"problem", "scores"},
    "torch_backend": {"autocast", "blockwise", "problem", "scores"},
    "built": set(),
    "cpu_arguments": {"problem"},
    "cpu_backend": {"built", "cpu_arguments", "problem"},
    "cpu_weights": {"autocast", "cpu_arguments", "cpu_backend", "listeners", "problem", "reference"},
    "cuda_architectures": set(),
    "cuda_backend": {"built", "cpu_arguments", "cuda_architectures", "problem"},
    "cuda_pages": {"cuda_backend", "problem"},
    "triton_kernels": set(),
    "triton_backend": {"problem"},
    "backend": {"cpu_backend", "cuda_backend", "problem", "torch_backend", "triton_backend"},
    "batching": set(),
    "second_derivative": {"blockwise", "problem", "scores"},
    "ops": {"backend", "batching", "blockwise", "listeners", "problem", "second_derivative"},
    "merge": {"problem"},
    "jagged": set(),
    "listeners": {"problem"},
    "call_facts": {"problem"},
    "plans": {"backend", "call_facts", "problem", "validation"},
    "calls": {"autocast", "backend", "dropout", "ops", "plans", "problem", "reference"},
    "functional": {"autocast", "backend", "calls", "cpu_weights", "jagged", "problem", "reference", "validation"},
    "sdpa": {"functional"},
    "host": {"problem"},
    "cache": {"host", "validation"},
    "paging": {"cache"},
    "cpu_pages": {"cpu_arguments", "cpu_backend", "problem"},
    "decoding": {
        *("autocast", "backend", "cache", "cpu_pages", "cuda_pages", "functional", "host", "listeners", "paging", "plans"),
        *("problem", "rotary", "triton_backend", "validation"),
    },
    "rotary": {"layer_ops", "validation"},
    "positional": set(),
    "layer_ops": {"cpu_backend", "listeners", "triton_backend"},
    "layers": {"cache", "decoding", "dropout", "functional", "layer_ops", "paging", "positional", "rotary"},
    "models": {"layers", "paging", "positional"},
    "examples": {"models"},
    "explanation": {"backend", "cache", "decoding", "functional", "ops", "problem"},
    "fused_attention": {
        *("backend", "cache", "decoding", "explanation", "functional"),
        *("layers", "merge", "paging", "problem", "rotary", "sdpa"),
    },
    "__main__": set(),
    "testing": {"fused_attention", "backend", "problem", "validation"},
    "benchmarks": {
        *("fused_attention", "examples", "models", "testing"),
        *("layer_ops", "backend", "listeners", "plans", "triton_backend"),  # four for host_path
        *("triton_kernels", "validation"),  # for experiments
    },
}
# What it may import besides, but only inside a function: what may be missing, or costs time that not every caller should pay.
LAZY: dict[str, set[str]] = {
    "built": {"_build_info"},
    "call_facts": {"_cpu"},
    "cpu_backend": {"_cpu"},
    "cpu_pages": {"_cpu"},
    "cpu_weights": {"_cpu"},
    "cuda_backend": {"_cuda"},
    "triton_backend": {"triton_kernels"},
    "layer_ops": {"_cpu", "triton_kernels"},
    "benchmarks": {"_cpu"},
    "__main__": {"fused_attention", "testing", "benchmarks", "_cpu", "_build_info"},
}
GENERATED = {"_cpu", "_cuda", "_build_info"}  # modules that a build makes: no source here has their names
# Other packages that may be needed to import a module; a runtime dependency is what every module may need.
DEPENDENCIES = {"torch"}
EXTRAS = {"benchmarks": {"rich", "matplotlib", "pytest", "triton"}, "examples": {"rich"}, "triton_kernels": {"triton"}}


class Import(NamedTuple):
    """One imported module, by its whole name, and where; a string that names one is for importlib, and as good as an import."""

    target: str
    lazy: bool  # inside a function
    line: int


def unit(module: str) -> str:
    """The row of the table that a module of fused_attention belongs to."""
    return (module.split(".") + [module])[1]


def modules() -> dict[str, Path]:
    """Every module of the package as installed, by name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if unit(name) not in GENERATED}


MODULES = modules()
NAMES = (MODULES.keys() | {f"fused_attention.{name}" for name in GENERATED}) - {"fused_attention"}  # strings that can only mean a module


def imports(tree: ast.AST, module: str, is_package: bool, lazy: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                here = parents[: len(parents) - node.level + is_package]
                base = ".".join([*here, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in MODULES or alias.name in GENERATED else base, lazy, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield Import(node.value, True, node.lineno)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, module, is_package, inside)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the imports of a module break, one sentence each."""
    found, row = [], unit(module)
    if row not in ALLOWED:
        return [f"{module} has no row in ALLOWED: say what it may import"]
    for target, lazy, line in imports(ast.parse(source), module, is_package):
        top = target.partition(".")[0]
        if top == "fused_attention":
            permitted = ALLOWED[row] | {row} | (LAZY.get(row, set()) if lazy else set())
            if unit(target) not in permitted:
                found.append(f"{module}:{line} imports {target}{' in a function' if lazy else ''}, {row} may import {sorted(permitted)}")
        elif not lazy and top not in sys.stdlib_module_names | DEPENDENCIES | EXTRAS.get(row, set()):
            found.append(f"{module}:{line} needs {target} to be imported, but the package depends on {sorted(DEPENDENCIES)}")
    return found


def test_every_import_goes_down() -> None:
    assert len(MODULES) > len(ALLOWED) / 2, f"the sources were not found under {ROOT}"
    found = [line for name, path in MODULES.items() for line in violations(name, path.read_text(), path.name == "__init__.py")]
    assert not found, "\n".join(found)


def test_the_table_names_no_module_that_is_gone() -> None:
    assert set(ALLOWED) == {unit(name) for name in MODULES}


def edges(sources: dict[str, str]) -> dict[bool, dict[str, set[str]]]:
    """What each row of the table imports of the others, when it is loaded (False) and in functions alone (True)."""
    rows = [unit(module) for module in MODULES]
    found: dict[bool, dict[str, set[str]]] = {lazy: {row: set() for row in rows} for lazy in (False, True)}
    for module, source in sources.items():
        row = unit(module)
        for target, lazy, _ in imports(ast.parse(source), module, MODULES[module].name == "__init__.py"):
            if target.partition(".")[0] == "fused_attention" and unit(target) != row:
                found[lazy][row].add(unit(target))
    for row, eager in found[False].items():
        found[True][row] -= eager
    return found


def unused(sources: dict[str, str]) -> list[str]:
    """The allowances that no import needs, one sentence each."""
    found = edges(sources)
    return [
        f"{row} may import {target}{' in a function' if lazy else ''}, and no module of it does: take it from the table"
        for lazy, table in ((False, ALLOWED), (True, LAZY))
        for row, targets in table.items()
        for target in sorted(targets - found[lazy][row])
    ]


def test_every_allowance_is_used() -> None:
    found = unused({name: path.read_text() for name, path in MODULES.items()})
    assert not found, "\n".join(found)


def test_an_unused_allowance_is_seen() -> None:
    sources = {name: path.read_text() for name, path in MODULES.items()}
    without = {name: "" if unit(name) in ("merge", "__main__") else source for name, source in sources.items()}
    lost = set(unused(without)) - set(unused(sources))
    assert {line.partition(",")[0] for line in lost} == {"merge may import problem"} | {
        f"__main__ may import {target} in a function" for target in LAZY["__main__"]
    }


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if name not in done and below <= done}
        assert ready, f"these can import each other: {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    oracle = MODULES["fused_attention.testing.oracle"]
    tops = {each.target.partition(".")[0] for each in imports(ast.parse(oracle.read_text()), "fused_attention.testing.oracle", False)}
    assert tops <= sys.stdlib_module_names | {"torch"}


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("fused_attention.problem", "from .functional import attention", True),
        ("fused_attention.problem", "from . import scores", True),
        ("fused_attention.problem", "def f():\n    from fused_attention.ops import forward", True),
        ("fused_attention.cpu_backend", "from . import _cpu", True),
        ("fused_attention.cpu_backend", "from fused_attention import _cpu", True),
        ("fused_attention.cpu_backend", "def f():\n    from . import _cpu", False),
        ("fused_attention.torch_backend", "def f():\n    from . import _cpu", True),
        ("fused_attention.torch_backend", "import fused_attention.cpu_backend", True),
        ("fused_attention.torch_backend", "import_module('fused_attention.cpu_backend')", True),
        ("fused_attention.__main__", "import_module('fused_attention._cpu')", False),
        ("fused_attention.torch_backend", "library = 'fused_attention'", False),
        ("fused_attention.layers.masks", "from ..functional import attention", False),
        ("fused_attention.layers.masks", "from fused_attention import attention", True),
        ("fused_attention.layers.masks", "if True:\n    from fused_attention.testing import oracle", True),
        ("fused_attention.benchmarks.gate", "from fused_attention.testing.oracle import oracle\nimport rich", False),
        ("fused_attention.functional", "import numpy", True),
        ("fused_attention.functional", "import math, torch.nn", False),
        ("fused_attention.helpers", "", True),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, broken: bool) -> None:
    assert bool(violations(module, source)) is broken


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert not violations("fused_attention.layers", "from .masks import score_masks", is_package=True)
    assert violations("fused_attention.layers", "from ..ops import forward", is_package=True)


def test_the_folder_of_kernels_is_no_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and vLLM import OpenAI's triton_kernels; from a checkout's root they would find this folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "triton_kernels", raising=False)
    with pytest.raises(ImportError, match="import it by that name"):
        import_module("triton_kernels")
