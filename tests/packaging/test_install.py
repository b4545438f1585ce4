"""What a user gets from a wheel, an sdist, a source tree and an editable install, with a compiler and without.

Each runs in a virtual environment of its own that has no pip (the running interpreter's pip installs into it) and installs
nothing but this package: a .pth file lends it the running interpreter's torch, which would otherwise be installed again each time.
Builds are isolated, with the packages that the machine's pip finds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parents[1]
QUICKLY = {"FUSED_ATTENTION_CPU": "1", "CXXFLAGS": "-O0"}
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.py", "results")
USE = """
import json, torch, fused_attention
from fused_attention.__main__ import collect
q = torch.randn(1, 4, 33, 16)
torch.testing.assert_close(fused_attention.attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
print(json.dumps(collect() | {"file": fused_attention.__file__}))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the C++ extension is not built on Windows")]


def run(*command: object, environ: dict[str, str] | None = None, fails: bool = False, cwd: Path | None = None) -> str:
    """The output of a command that must succeed, or must fail; the variables that steer a build are what `environ` says."""
    steering = ("FUSED_ATTENTION_", "PYTHONPATH", "CXX", "CC", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "NVCC_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    done = subprocess.run(
        [str(part) for part in command],
        env=clean | (environ or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) is fails, done.stdout
    return done.stdout


def build_wheel(source: Path, folder: Path, **environ: str) -> Path:
    """The wheel that pip builds from a tree or an sdist."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, environ=environ)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


class Environment:
    """A virtual environment that sees the running interpreter's torch."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.bin = folder / "bin"
        self.folder = folder
        self.packages = Path(
            sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, {"base": str(folder)})
        )
        (self.packages / "torch.pth").write_text(f"{TORCH}\n")

    def pip(self, *arguments: object, fails: bool = False, **environ: str) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.bin / "python", *arguments, environ=environ, fails=fails)

    def python(self, code: str) -> str:
        return run(self.bin / "python", "-c", code, cwd=self.folder).strip()

    def use(self) -> dict[str, Any]:
        """What `info` says and where the package is, after a call that gave the right result."""
        facts: dict[str, Any] = json.loads(self.python(USE))
        return facts

    def top_level(self) -> set[str]:
        """What the package put beside itself in site-packages."""
        return {path.name for path in self.packages.iterdir() if path.suffix not in (".pth", ".dist-info") and path.name != "__pycache__"}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def copy_tree(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that builds may write into; its objects are shared by the tests of this file."""
    return copy_tree(tmp_path_factory.mktemp("project") / "tree")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, tree)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), **QUICKLY)


def test_the_sdist_holds_what_builds_and_tests_the_package(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "build_tools", "python", "tests", "benchmarks")
    wanted = {str(path.relative_to(tree)) for name in folders for path in (tree / name).rglob("*") if path.is_file()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= held
    assert {name for name in wanted - held if not name.endswith(".pyc") and ".egg-info" not in name} == set()


def test_the_wheel_made_from_the_sdist_holds_one_package(wheel: Path) -> None:
    held = names(wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"fused_attention"}
    assert f"fused_attention/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in held
    assert {
        "fused_attention/py.typed",
        "fused_attention/_cpu.pyi",
        "fused_attention/_build_info.py",
        "fused_attention/benchmarks/__init__.py",
    } <= held
    files = {name for name in held if ".dist-info/" not in name and not name.endswith("/")}
    assert {Path(name).suffix for name in files} == {".py", ".pyi", ".typed", ".so"}
    assert sysconfig.get_config_var("SOABI").split("-")[1] in wheel.name.split("-")[2]


def test_the_wheel_depends_on_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needs = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert needs == ["torch>=2.9"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads an ELF file with binutils' nm and readelf")
def test_the_extension_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so"))
    symbols = run("nm", "-D", library)
    assert "PyInit__cpu" in symbols
    assert not [line for line in symbols.splitlines() if any(word in line for word in ("torch", "c10", "at6Tensor", "caffe2"))]
    needed = {line.split("[")[1].partition(".so")[0] for line in run("readelf", "-d", library).splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++", "libgomp", "libgcc_s", "libm", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_the_wheel_runs(wheel: Path, environment: Environment) -> None:
    environment.pip("install", "--no-deps", wheel)
    assert environment.top_level() == {"fused_attention"}
    facts = environment.use()
    assert facts.pop("file").startswith(str(environment.packages))
    assert facts["backends"]["cpu"] == "on"
    assert "-ffp-contract=fast" in facts["build"]["cpu"]
    for command in ([environment.bin / "fused-attention"], [environment.bin / "python", "-m", "fused_attention"]):
        assert json.loads(run(*command, "info", "--json", cwd=environment.folder)) == facts


def test_a_tree_installs_then_an_editable_install_replaces_it(tree: Path, environment: Environment) -> None:
    environment.pip("install", "--no-deps", tree, **QUICKLY)
    assert environment.top_level() == {"fused_attention"}
    facts = environment.use()
    assert facts["file"].startswith(str(environment.packages))
    assert facts["backends"]["cpu"] == "on"

    environment.pip("install", "--no-deps", "-e", tree, **QUICKLY)
    facts = environment.use()
    assert facts["file"].startswith(str(tree))
    assert facts["backends"]["cpu"] == "on"
    for folder in ("python/fused_attention", "benchmarks"):
        (tree / folder / "added_later.py").write_text("VALUE = 7\n")
    both = "import fused_attention.added_later as one, fused_attention.benchmarks.added_later as two; print(one.VALUE + two.VALUE)"
    assert environment.python(both) == "14"
    for folder in ("python/fused_attention", "benchmarks"):
        (tree / folder / "added_later.py").unlink()

    # An extension left by the last editable install would be imported although this one did not build it.
    environment.pip("install", "--no-deps", "-e", tree, FUSED_ATTENTION_CPU="0")
    assert not list(tree.rglob("python/**/*.so"))
    assert "FUSED_ATTENTION_CPU=0" in environment.use()["build"]["cpu"]


def test_without_a_compiler_the_install_is_pure_and_says_so(tree: Path, environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nothing = {"PATH": str(tmp_path / "empty"), "CC": "/nonexistent"}
    wheel = build_wheel(tree, tmp_path, **nothing)
    assert wheel.name.endswith("-py3-none-any.whl")
    environment.pip("install", "--no-deps", wheel)
    facts = environment.use()
    assert "no C++ compiler was found" in facts["build"]["cpu"]
    assert "no C++ compiler was found" in facts["backends"]["cpu"]

    failure = environment.pip("install", "--no-deps", tree, fails=True, FUSED_ATTENTION_CPU="1", **nothing)
    assert "FUSED_ATTENTION_CPU=1 demands the C++ extension, but no C++ compiler was found" in failure


def test_sources_that_do_not_compile(tree: Path, environment: Environment, tmp_path: Path) -> None:
    """An extension of an earlier build, still in setuptools' build folder, once got into the wheel of the build that failed."""
    (folder := tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fused_attention").mkdir(
        parents=True, exist_ok=True
    )
    (folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"stale")
    broken = {"CXXFLAGS": "-include no_such_header.h"}
    wheel = build_wheel(tree, tmp_path, **broken)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]
    record = zipfile.ZipFile(wheel).read("fused_attention/_build_info.py").decode()
    assert "do not compile with" in record
    assert "no_such_header.h" in record
    assert "no_such_header.h" in environment.pip("install", "--no-deps", tree, fails=True, FUSED_ATTENTION_CPU="1", **broken)


def test_the_triton_kernels_are_installed_inside_the_package(tmp_path: Path) -> None:
    """transformers and vLLM import OpenAI's triton_kernels: a top-level package of that name would hide it."""
    tree = copy_tree(tmp_path / "tree")
    kernels = tree / "triton_kernels"
    kernels.mkdir(exist_ok=True)
    (kernels / "__init__.py").touch()
    held = names(build_wheel(tree, tmp_path, FUSED_ATTENTION_CPU="0"))
    assert "fused_attention/triton_kernels/__init__.py" in held
    assert not [name for name in held if name.startswith(("triton_kernels", "benchmarks", "tests", "build_tools"))]
