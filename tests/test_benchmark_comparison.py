"""The benchmark's comparison of two results: what counts as slower, and which files and environments it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmark's table needs rich: pip install 'fused-attention[bench]'")

from fused_attention.benchmarks import comparison, environment, report, timing, workloads
from fused_attention.benchmarks.contenders import OURS
from fused_attention.benchmarks.measure import Row
from fused_attention.benchmarks.workloads import Workload

ONCE = timing.Protocol(least_rounds=2, most_rounds=2, budget=0.0)
CAUSAL = Workload("tiny-causal", "tiny causal", 2, 6, 23, 23, 16, kv_heads=3, causal=True)


def made_file(path: Path, medians: dict[str, float | None], *, spread: float = 0.01, **changed: Any) -> Path:
    """A result with a row of ours by name; spread is each row's interquartile range over its median."""
    stamp = dict.fromkeys(environment.COMPARED, "same") | changed
    rows = []
    for name, median in medians.items():
        lost = median is None
        made = None if lost else timing.Timing(median, median * (1 - spread / 2), median * (1 + spread / 2), median * 0.9, 5)
        rows.append(Row(name, "attention", "fp32", "forward", OURS, ours=True, flops=1e9, timing=made, failed=lost))
    report.write_json(path, report.as_json(stamp, rows, [], None) | {"workloads": {}})
    return path


def compare(tmp_path: Path, before: Path, after: Path, *given: str) -> int:
    parser = argparse.ArgumentParser()
    comparison.add_arguments(parser)
    return comparison.run(parser.parse_args([str(before), str(after), *given]))


@pytest.mark.parametrize(
    ("after", "spread", "status", "word"),
    [
        (1.10, 0.01, 1, "slower than the limit"),
        (1.02, 0.001, 0, "slower"),
        (1.10, 0.20, 0, "inside the noise"),
        (0.80, 0.01, 0, "faster"),
        (None, 0.01, 1, "lost its speed"),
    ],
)
def test_compare_judges_changes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    after: float | None,
    spread: float,
    status: int,
    word: str,
) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "one", CAUSAL)
    before, later = (made_file(tmp_path / f"{name}.json", {"one": median}, spread=spread) for name, median in (("a", 1.0), ("b", after)))
    assert compare(tmp_path, before, later, "--fail-if-slower", "3%") == status
    assert word in capsys.readouterr().out
    assert compare(tmp_path, before, later) == 0  # without a limit it only tells


def test_compare_leaves_other_work_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        monkeypatch.setitem(workloads.WORKLOADS, name, CAUSAL)
    before = made_file(tmp_path / "a.json", {"one": 1.0, "two": 1.0})
    after = made_file(tmp_path / "b.json", {"one": 2.0, "two": 1.0})
    content = json.loads(after.read_text())
    content["rows"][0]["flops"] *= 2
    after.write_text(json.dumps(content))
    assert compare(tmp_path, before, after, "--fail-if-slower", "3%") == 0
    assert "1 rows of" in capsys.readouterr().out


@pytest.mark.parametrize("key", environment.COMPARED)
def test_compare_refuses_other_environments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "one", CAUSAL)
    before, after = made_file(tmp_path / "a.json", {"one": 1.0}), made_file(tmp_path / "b.json", {"one": 1.0}, **{key: "other"})
    assert compare(tmp_path, before, after) == 2
    assert f"{key} was 'same' and is 'other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "word"), [("{", "not JSON"), ("[]", "expected 1"), ('{"schema": 99}', "schema 99"), (None, "can't be read")]
)
def test_compare_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, word: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    assert compare(tmp_path, path, path) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("text", ["fast", "-3%", "nan", "inf%"])
def test_compare_refuses_other_limits(tmp_path: Path, text: str) -> None:
    with pytest.raises(SystemExit):
        compare(tmp_path, tmp_path / "a", tmp_path / "b", f"--fail-if-slower={text}")


def test_stamps_differ_only_where_it_matters() -> None:
    stamp = environment.stamp(ONCE, "untouched", 0)
    assert set(environment.COMPARED) >= {"cpu", "cores", "threads", "torch", "clock", "malloc"}
    assert environment.differences(stamp, stamp | {"package": "other", "date": "later", "load_average": None}) == []
    json.dumps(stamp, allow_nan=False)
