"""The command line: what `info` says, that a command loads only what it needs, and what a missing extra answers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import fused_attention
from fused_attention.__main__ import COMMANDS, main


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter that has loaded nothing."""
    return subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_info_as_json_agrees_with_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fused_attention"] == fused_attention.__version__
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["backends"] == {name: reason or "on" for name, reason in fused_attention.backends().items()}
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["machine"]["instruction set of the cpu backend"] == "none") is (fused_attention.backends()["cpu"] is not None)
    assert facts["build"]


def test_info_as_text_names_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for name, reason in fused_attention.backends().items():
        assert f"  {name}: {reason or 'on'}\n" in shown


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{command.name} " in shown for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fused-attention" in capsys.readouterr().err


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_each_command_explains_itself(command: str) -> None:
    done = fresh(f"from fused_attention.__main__ import main\nmain([{command!r}, '--help'])")
    assert done.returncode == 0, done.stderr
    assert f"usage: fused-attention {command}" in done.stdout


def test_info_loads_neither_the_testing_nor_the_benchmark() -> None:
    done = fresh(
        "from fused_attention.__main__ import main\nmain(['info'])\n"
        "sys.exit(any(name.startswith(('fused_attention.testing', 'fused_attention.benchmarks')) for name in sys.modules))"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "matplotlib.pyplot"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "fused_attention.benchmarks.command", bench_that(lambda args: importlib.import_module(missing)))
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == f"fused-attention bench needs {missing}: pip install fused-attention[bench]\n"


def test_another_missing_module_is_a_fault_and_shows_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bench_that(lambda args: importlib.import_module("no_such_module"))
    monkeypatch.setitem(sys.modules, "fused_attention.benchmarks.command", broken)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["bench"])


@pytest.mark.parametrize("status", [0, 1])
def test_the_exit_status_is_the_commands(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fused_attention.benchmarks.command", bench_that(lambda args: status))
    assert main(["bench"]) == status


def bench_that(run: Callable[[Namespace], object]) -> ModuleType:
    """A module in the place of the bench command."""
    module = ModuleType("command")
    vars(module).update(run=run, add_arguments=lambda parser: None)
    return module
