"""The setuptools commands: compile what can be compiled, go on without it unless it was demanded, and record both.

build = build_py, build_ext, build_record        build_record writes fused_attention/_build_info.py
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Command
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_tools.cpu_extension import compile_cpu
from build_tools.cuda_extension import compile_cuda
from build_tools.switches import is_demanded, switch, variable

PACKAGE = Path("python/fused_attention")
LANGUAGES = {"cpu": "C++", "cuda": "CUDA"}

reasons: dict[str, str | None] = {}  # for each extension None, or why it was not built
built: dict[str, dict[str, str]] = {}  # for each extension that was built, with what


class BuildExt(build_ext):
    """Builds the compiled parts; one that can't be built is left out, unless it was demanded, and without any the distribution is pure."""

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            part = ext.name.removeprefix("fused_attention._")
            try:
                self.build_extension(ext)
                reasons[part] = None
            except CompileError as error:
                if is_demanded(part):
                    name = variable(part)
                    demand = f"{name}={switch(name)} demands the {LANGUAGES[part]} extension, but {error}"
                    raise CompileError(f"{demand}\n{name}=auto would install without it") from error
                reasons[part] = str(error)
                self.extensions.remove(ext)
        self.distribution.ext_modules = self.extensions
        if not self.extensions:
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
        part = ext.name.removeprefix("fused_attention._")
        # A folder of its own: setuptools' temporary one is new for each editable install, and ninja could reuse nothing.
        objects = Path("build") / f"{part}-{sysconfig.get_config_var('SOABI')}"
        build = {"cpu": compile_cpu, "cuda": compile_cuda}[part]
        built[part] = build(ext.sources, Path(self.get_ext_fullpath(ext.name)), objects)


class BuildRecord(Command):
    """Writes fused_attention/_build_info.py and prints what it says."""

    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        record = Path(self._source() if self.editable_mode else self._output())
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(
            '"""What the build of this installation compiled, and why not the rest; written by the build."""\n\n'
            f"REASONS: dict[str, str | None] = {reasons!r}\n"
            f"BUILT: dict[str, dict[str, str]] = {built!r}\n"
        )
        if self.editable_mode:
            # Left by an earlier editable install, it would be imported as if it were this one's.
            for stale in (path for part, reason in reasons.items() if reason for path in PACKAGE.glob(f"_{part}.*.so")):
                stale.unlink()
        lines = [
            f"  {name}: " + (f"NOT BUILT, {reason}" if reason else f"built with {built[name]['compiler']}")
            for name, reason in reasons.items()
        ]
        print("\n".join(["", "fused-attention's compiled parts:", *lines, ""]), file=sys.stderr, flush=True)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [self._output()]

    def get_output_mapping(self) -> dict[str, str]:
        return {self._output(): self._source()} if self.editable_mode else {}

    def _output(self) -> str:
        return str(Path(str(self.build_lib)) / "fused_attention" / "_build_info.py")

    def _source(self) -> str:
        return str(PACKAGE / "_build_info.py")


class Build(build):
    """setuptools' build from a clean folder, then the record."""

    sub_commands = [*build.sub_commands, ("build_record", None)]  # noqa: RUF012 (setuptools' own form)

    def run(self) -> None:
        # setuptools only adds: a module since deleted, or the extension of an earlier build, would enter the wheel.
        shutil.rmtree(Path(self.build_lib) / "fused_attention", ignore_errors=True)
        super().run()
