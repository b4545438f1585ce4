"""The package as it lies in the checkout, for an interpreter in which it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find() -> None:
    if importlib.util.find_spec("fused_attention") is not None:
        return
    sys.path.insert(0, str(ROOT / "python"))
    import fused_attention

    for name in ("triton_kernels", "benchmarks"):
        folder = ROOT / name
        spec = importlib.util.spec_from_file_location(
            f"fused_attention.{name}", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{folder} holds no package")
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"fused_attention.{name}"] = module
        setattr(fused_attention, name, module)
        spec.loader.exec_module(module)
