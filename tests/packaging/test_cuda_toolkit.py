"""Where a build finds nvcc, and what it says where there is none that will do."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("setuptools", reason="the build needs setuptools")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux alone")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module(f"build_tools.{name}")


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return module("cuda_toolkit", monkeypatch)


def install(home: Path, libraries: str = "lib64", include: str = "include", release: str = "13.0") -> Path:
    """A toolkit as far as a build looks at it before it compiles."""
    for folder in ("bin", libraries, include):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / libraries / "libcudart_static.a").touch()
    (home / include / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f"case $1 in --version) echo 'Cuda compilation tools, release {release}, V{release}.88';;\n"
        f"*) echo '#$ _HERE_={home}/bin' >&2;; esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("libraries", ["lib64", "lib", "targets/x86_64-linux/lib"])
@pytest.mark.parametrize("include", ["include", "targets/x86_64-linux/include"])
def test_the_runtime_is_found_in_each_layout(toolkit, tmp_path, monkeypatch, libraries, include):
    """The packages of PyPI have lib and no lib64, and a linker that is told lib64 alone does not find the runtime."""
    nvcc = install(tmp_path, libraries, include)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.find_toolkit()[:4] == (nvcc, tmp_path / include, tmp_path / libraries, (13, 0))


def test_a_script_on_the_path_is_asked_where_the_toolkit_is(toolkit, tmp_path, monkeypatch):
    """The folder above a script in /usr/local/bin is no toolkit."""
    nvcc, script = install(tmp_path / "cuda"), tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    found = toolkit.find_toolkit()
    assert (found.nvcc, found.libraries) == (script, tmp_path / "cuda" / "lib64")


def test_the_packages_are_searched_where_they_are_asked_for_alone(toolkit, tmp_path, monkeypatch):
    nvcc = install(tmp_path / "site" / "nvidia" / "cu13", "lib")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert toolkit.find_toolkit(from_packages=True).nvcc == nvcc
    with pytest.raises(toolkit.CompileError, match="nvcc was not found"):
        toolkit.find_toolkit()


def test_the_packages_are_of_one_release(toolkit):
    """nvcc alone brought a newer nvvm, and ended in: Unsupported .version 9.5; current version is '9.0'."""
    assert len({re.sub(r".*==", "", package) for package in toolkit.PACKAGES}) == 1
    assert {re.sub(r"==.*", "", package) for package in toolkit.PACKAGES} >= {"nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"}


def test_what_will_not_do_is_refused_with_a_sentence(toolkit, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(toolkit.CompileError, match=r"CUDA_HOME is .*nowhere, where there is no bin/nvcc"):
        toolkit.find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    install(tmp_path, release="12.6")
    with pytest.raises(toolkit.CompileError, match=r"is of CUDA 12\.6: install CUDA 12\.8 or later"):
        toolkit.find_toolkit()
    install(tmp_path)
    (tmp_path / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(toolkit.CompileError, match=r"has no libcudart_static\.a"):
        toolkit.find_toolkit()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(toolkit.CompileError, match="does not run"):
        toolkit.find_toolkit()


def test_architectures(monkeypatch):
    extension = module("cuda_extension", monkeypatch)
    assert extension.code_flags("80+PTX,90,90a+PTX,103,120") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
        "-gencode=arch=compute_100,code=sm_103",
        "-gencode=arch=compute_100,code=sm_120",
    ]
    for wrong in ("sm_90", "90;80", "", "8"):
        with pytest.raises(SystemExit, match=r"FUSED_ATTENTION_CUDA_ARCHS is .* is no architecture"):
            extension.code_flags(wrong)
    with pytest.raises(SystemExit, match=r"FUSED_ATTENTION_CUDA_ARCHS is '90,75': the kernels need the instructions of 80 or later"):
        extension.code_flags("90,75")


@pytest.mark.parametrize(("asked", "compiler"), [("pypi", True), ("1", False), ("0", False)])
def test_an_isolated_build_gets_the_compiler_where_it_is_asked_for(asked, compiler, monkeypatch):
    """pip asks the build backend what to install before it builds."""
    hooks = pytest.importorskip("setuptools.build_meta", reason="the build needs setuptools")
    toolkit = module("cuda_toolkit", monkeypatch)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", asked)
    needed = hooks.get_requires_for_build_wheel()
    assert set(toolkit.PACKAGES) <= set(needed) if compiler else not set(toolkit.PACKAGES) & set(needed)
