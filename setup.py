"""Which packages the distribution holds, from which folders, and its optional C++ extension; the metadata is in pyproject.toml.

FUSED_ATTENTION_CPU = auto (build it if a compiler is there) | 1 (or fail) | 0 (do not)
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build backends run this file without the project's folder on the path

from build_tools import commands  # noqa: E402 (needs the line above)
from build_tools.cpu_extension import cpu_extension  # noqa: E402
from build_tools.switches import refuse_cuda, switch  # noqa: E402

# Folders at the top of the repository that are installed inside the package, never beside it.
MAPPED = [name for name in ("benchmarks", "triton_kernels") if (ROOT / name / "__init__.py").is_file()]
PACKAGES = find_packages("python") + [
    f"fused_attention.{name}" for folder in MAPPED for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
]

commands.reasons["cpu"] = "the build was asked to leave it out (FUSED_ATTENTION_CPU=0)"
commands.reasons["cuda"] = refuse_cuda()

setup(
    packages=PACKAGES,
    package_dir={"": "python"} | {f"fused_attention.{name}": name for name in MAPPED},
    package_data={"fused_attention": ["py.typed", "*.pyi"]},
    include_package_data=False,  # or benchmark results and whatever else MANIFEST.in grafts would be installed
    ext_modules=[] if switch("FUSED_ATTENTION_CPU", ("auto", "1", "0")) == "0" else [cpu_extension()],
    cmdclass={"build": commands.Build, "build_ext": commands.BuildExt, "build_record": commands.BuildRecord},
)
