"""The generator's command line over many problems, as `make fuzz` runs it: it counts, goes on after a failure, and names each one."""

from __future__ import annotations

import pytest

from fused_attention import backends, blockwise
from fused_attention.testing import generator


def test_many_problems_are_counted(capsys):
    assert generator.main(["--count", "4", "--first", "40", "--backend", "torch"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("4 of 4 problems, 4 runs, 0 failed, at most")
    assert "% of a bound used (torch, seed 4" in line


def wrong(q, k, v, problem, original=blockwise.forward):
    return original(q, k, v, problem._replace(scale=problem.scale + 0.1))


def crashing(q, k, v, problem):
    raise FloatingPointError("planted")


@pytest.mark.parametrize(("forward", "sign"), [(wrong, "times its bound"), (crashing, "FloatingPointError: planted")])
def test_every_failure_is_named_with_the_line_that_repeats_it(forward, sign, monkeypatch, capsys):
    monkeypatch.setattr(blockwise, "forward", forward)
    assert generator.main(["--count", "6", "--backend", "torch"], command="run") == 1
    lines = capsys.readouterr().out.splitlines()
    again = [line.removeprefix("again: ") for line in lines if line.startswith("again: ")]
    assert len(again) > 1, "the first failure ended it"
    assert all(line.startswith("run --seed ") and line.endswith(" --backend torch") for line in again)
    assert lines[-len(again) :] == again
    assert any(sign in line for line in lines)
    seed = again[0].split()[2]
    assert generator.main(["--seed", seed, "--backend", "torch"]) == 1
    assert "torch: FAILED" in capsys.readouterr().out


def test_problems_that_nobody_can_run_are_no_success(capsys):
    assert generator.main(["--seed", "3", "--backend", "cuda"]) == 1
    assert f"cuda: {backends()['cuda']}" in capsys.readouterr().out
    assert generator.main(["--count", "2", "--backend", "cuda"]) == 1
    assert "2 of 2 problems, 0 runs" in capsys.readouterr().out
