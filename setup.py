"""Which packages the distribution holds, from which folders, and its optional extensions; the metadata is in pyproject.toml.

FUSED_ATTENTION_CPU = auto (build it if a compiler is there) | 1 (or fail) | 0 (do not)
FUSED_ATTENTION_CUDA = 0 (do not build it) | auto (if nvcc is there) | 1 (or fail) | pypi (with the nvcc that PyPI has, or fail)
FUSED_ATTENTION_CUDA_ARCHS = 80+PTX,90,100,120
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build backends run this file without the project's folder on the path

from build_tools import commands  # noqa: E402 (needs the line above)
from build_tools.cpu_extension import cpu_extension  # noqa: E402
from build_tools.cuda_extension import cuda_extension  # noqa: E402
from build_tools.cuda_toolkit import PACKAGES as COMPILER_PACKAGES  # noqa: E402
from build_tools.switches import switch, variable  # noqa: E402

# Folders at the top of the repository that are installed inside the package, never beside it.
MAPPED = [name for name in ("benchmarks", "triton_kernels") if (ROOT / name / "__init__.py").is_file()]
PACKAGES = find_packages("python") + [
    f"fused_attention.{name}" for folder in MAPPED for name in (folder, *(f"{folder}.{inner}" for inner in find_packages(folder)))
]

PARTS = {"cpu": cpu_extension, "cuda": cuda_extension}
commands.reasons |= {
    "cpu": "the build was asked to leave it out (FUSED_ATTENTION_CPU=0)",
    "cuda": "the build leaves it out unless it is asked for: FUSED_ATTENTION_CUDA=auto pip install fused-attention, where there is an nvcc",
}

setup(
    packages=PACKAGES,
    package_dir={"": "python"} | {f"fused_attention.{name}": name for name in MAPPED},
    package_data={"fused_attention": ["py.typed", "*.pyi"]},
    include_package_data=False,  # or benchmark results and whatever else MANIFEST.in grafts would be installed
    ext_modules=[extension() for part, extension in PARTS.items() if switch(variable(part)) != "0"],
    # What an isolated build installs besides what pyproject.toml names.
    setup_requires=COMPILER_PACKAGES if switch("FUSED_ATTENTION_CUDA") == "pypi" else (),
    cmdclass={"build": commands.Build, "build_ext": commands.BuildExt, "build_record": commands.BuildRecord},
)
