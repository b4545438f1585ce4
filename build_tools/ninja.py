"""What the builds of the compiled parts share: pybind11's headers behind a link, ninja on one file of rules, its result put in place."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.errors import CompileError

Rules = dict[str, str]  # the command of each rule, in ninja's syntax


def include_flags(folder: Path) -> list[str]:
    """Of csrc, pybind11 and Python, as seen from `folder`, which is made."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    # An isolated build finds pybind11 in a new place each time; behind a link the commands, and so the objects, stay valid.
    pybind = Path(f"pybind11-{pybind11.__version__}")
    (folder / pybind).unlink(missing_ok=True)
    (folder / pybind).symlink_to(pybind11.get_include(), target_is_directory=True)
    return [f"-I{os.path.relpath('.', folder)}/csrc", "-isystem", str(pybind), "-isystem", sysconfig.get_paths()["include"]]


def pybind_version() -> str:
    import pybind11

    return str(pybind11.__version__)


def command(*words: str) -> str:
    """A shell command that ninja leaves as it is, but for $in and $out at its end."""
    from ninja.ninja_syntax import escape

    return str(escape(shlex.join(words)))


def make(folder: Path, rules: Rules, objects: dict[str, tuple[str, str]], target: str, compilers: str, failure: str) -> Path:
    """Links `target` in `folder` from objects, each made of a source by a rule.

    They are remade when the source, a header, a command or `compilers` changes, which tells a compiler from what lies in its place later.
    The rule `link` makes the target; the others write the headers they read to $out.d. Raises CompileError with `failure` and the
    compiler's message.
    """
    from ninja.ninja_syntax import escape_path

    root = os.path.relpath(".", folder)
    made_with = folder / "compilers.txt"
    if not made_with.exists() or made_with.read_text() != compilers:
        made_with.write_text(compilers)
    lines = []
    for name, line in rules.items():
        lines += [f"rule {name}", f"  command = {line}"]
        if name != "link":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for out, (source, rule) in objects.items():
        lines.append(f"build {escape_path(out)}: {rule} {escape_path(f'{root}/{source}')} | {made_with.name}")
    lines += [f"build {target}: link {' '.join(map(escape_path, objects))}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    made = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(folder), f"-j{os.cpu_count() or 1}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(made.stdout, flush=True)
    if made.returncode:
        errors = [line for line in made.stdout.splitlines() if "error" in line] or made.stdout.splitlines()[-1:]
        raise CompileError(f"{failure}: {errors[0] if errors else 'ninja says nothing'}")
    return folder / target


def place(library: Path, target: Path) -> None:
    """A copy at `target`, as a new file: written over in place, it would end every process that has the old one loaded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        shutil.copy2(library, new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
