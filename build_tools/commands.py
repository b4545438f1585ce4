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
from build_tools.switches import switch

PACKAGE = Path("python/fused_attention")

reasons: dict[str, str | None] = {}  # for each extension None, or why it was not built
built: dict[str, dict[str, str]] = {}  # for each extension that was built, with what


class BuildExt(build_ext):
    """Builds fused_attention._cpu; without it the distribution becomes pure, unless FUSED_ATTENTION_CPU=1."""

    def run(self) -> None:
        try:
            super().run()
        except CompileError as error:
            if switch("FUSED_ATTENTION_CPU", ("auto", "1", "0")) == "1":
                raise CompileError(
                    f"FUSED_ATTENTION_CPU=1 demands the C++ extension, but {error}\nFUSED_ATTENTION_CPU=auto would install without it"
                ) from error
            reasons["cpu"] = str(error)
            self.extensions = []
            self.distribution.ext_modules = []
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
        # A folder of its own: setuptools' temporary one is new for each editable install, and ninja could reuse nothing.
        objects = Path("build") / f"cpu-{sysconfig.get_config_var('SOABI')}"
        built["cpu"] = compile_cpu(ext.sources, Path(self.get_ext_fullpath(ext.name)), objects)
        reasons["cpu"] = None


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
        if self.editable_mode and reasons["cpu"]:
            # Left by an earlier editable install, it would be imported as if it were this one's.
            for stale in PACKAGE.glob("_cpu*.so"):
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
