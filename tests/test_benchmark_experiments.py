"""The race of the experiments without a GPU: who is refused or wrong, what a process dies of, the table, a rehearsal from end to end."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from fused_attention.benchmarks.experiments import __main__ as driver
from fused_attention.benchmarks.experiments import calls, race, report, warp_specialized
from fused_attention.benchmarks.experiments.grid import GRID, PLAIN, cell
from fused_attention.benchmarks.experiments.variants import Call
from fused_attention.benchmarks.timing import Protocol
from fused_attention.benchmarks.workloads import AttentionInputs, Workload

from fused_attention import attention_with_lse
from fused_attention.validation import check

ONCE = Protocol(least_rounds=1, most_rounds=1, budget=0.0)
SMALL = replace(cell(64, True, 1024), batch=1, heads=2, kv_heads=1, seqlen_q=48, seqlen_k=48, head_dim=16)


def reference(inputs: AttentionInputs) -> Call:
    return lambda: attention_with_lse(inputs.q, inputs.k, inputs.v, causal=inputs.workload.causal, backend="reference")._asdict()


def wrong(inputs: AttentionInputs) -> Call:
    def call() -> dict[str, Tensor]:
        found = reference(inputs)()
        found["out"][-1, -1, -1, -1] += 0.1
        return found

    return call


def unsteady(inputs: AttentionInputs) -> Call:
    """Right, but with other bits at each call."""
    calls = itertools.count()

    def call() -> dict[str, Tensor]:
        found = reference(inputs)()
        found["out"].view(torch.int16)[0, 0, 0, 0] ^= next(calls) & 1  # the last digit of one number
        return found

    return call


def refusing(inputs: AttentionInputs) -> Call:
    raise NotImplementedError("not on a CPU")


def facts_of(variants: dict[str, Any], workload: Workload = SMALL) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    race.race(workload, variants, ONCE, said.append)
    json.dumps(said, allow_nan=False)
    return said


def test_only_what_is_right_is_timed() -> None:
    said = facts_of({PLAIN: reference, "wrong": wrong, "refusing": refusing, "unsteady": unsteady, "right": reference})
    reasons = {fact["checked"]: fact["reason"] for fact in said if "checked" in fact}
    assert reasons[PLAIN] is reasons["right"] is None
    assert "from the plain kernel it differs by at most 0.1" in reasons["wrong"]
    assert reasons["refusing"] == "NotImplementedError: not on a CPU"
    assert reasons["unsteady"] == "a second call gave other bits"
    timed = next(fact["milliseconds"] for fact in said if "milliseconds" in fact)
    assert set(timed) - {"flash"} == {PLAIN, "right"}
    assert any(fact.get("refused") == "cuDNN" for fact in said)
    cell_facts = report.finished(SMALL, "small", said)
    assert cell_facts["wrong"] == ["unsteady", "wrong"]
    pairs = 48 * 49 // 2 * 2
    assert cell_facts["tflops"]["right"] == pytest.approx(4 * 16 * pairs / timed["right"] / 1e9)


@pytest.mark.parametrize("lost", [False, True])
def test_a_variant_that_loses_the_device_ends_the_process(
    lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it is told of: else all that follow are refused for its error."""

    def synchronize(device: torch.device) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(race.os, "_exit", ended)
    monkeypatch.setattr(race, "AttentionGate", lambda inputs: None)
    there = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(race, "attention_inputs", lambda *_: there)
    monkeypatch.setattr(race, "RIVALS", {})
    said: list[dict[str, Any]] = []
    if not lost:
        race.race(SMALL, {"refusing": refusing}, ONCE, said.append)
        assert {"checked": "refusing", "reason": "NotImplementedError: not on a CPU", "share": None} in said
        return
    with pytest.raises(SystemExit, match=str(race.DEVICE_LOST)):
        race.race(SMALL, {"refusing": refusing}, ONCE, said.append)
    assert said == [{"began": "refusing"}]
    assert capsys.readouterr().err == "NotImplementedError: not on a CPU\n"


CHILD = """
import json, os, sys, time
without = sys.argv[sys.argv.index("--without") + 1:]
for name in ("plain", "hanging", "crashing", "fine"):
    if name in without: continue
    print(json.dumps({"began": name}), flush=True)
    if name == "hanging": time.sleep(600)
    if name == "crashing": os._exit(11)
    print(json.dumps({"checked": name, "reason": None, "share": 0.5}), flush=True)
print(json.dumps({"began": "timing"}), flush=True)
if "fine" not in sys.argv[1]: print(json.dumps({"milliseconds": {"plain": 2.0, "fine": 1.0}}), flush=True)
else: os._exit(7)
"""


def test_a_cell_goes_on_without_what_its_process_died_of() -> None:
    lost: list[str] = []
    cell_facts = report.finished(SMALL, "small", driver.run_cell([sys.executable, "-c", CHILD, "x"], lost, limit=3.0))
    assert lost == ["hanging", "crashing"]
    assert cell_facts["milliseconds"] == {"plain": 2.0, "fine": 1.0}
    assert cell_facts["reasons"] == {"hanging": "hung for 3 seconds", "crashing": "ended with status 11: it said nothing"}
    assert cell_facts["wrong"] == ["crashing", "hanging"]


def test_a_cell_whose_timing_dies_ends() -> None:
    lost = ["hanging", "crashing"]
    said = driver.run_cell([sys.executable, "-c", CHILD, "fine"], lost, limit=60.0)
    assert lost == ["hanging", "crashing"]
    assert report.finished(SMALL, "small", said)["reasons"] == {"timing": "ended with status 7: it said nothing"}


def made_up(name: str, speeds: dict[str, float], **reasons: str) -> dict[str, Any]:
    return {"name": name, "tflops": speeds, "error_share": {"plain": 0.1, "new": 0.2}, "reasons": reasons, "wrong": []}


def test_the_table_puts_variants_beside_rivals() -> None:
    cells = [made_up("a", {"plain": 400.0, "new": 600.0, "cuDNN": 500.0}), made_up("b", {"plain": 100.0}, new="it hung", cuDNN="no")]
    lines = report.table(cells).splitlines()
    assert lines[0].split() == ["TFLOP/s", "plain", "new", "cuDNN", "best", "/", "cuDNN"]
    assert lines[1].split() == ["a", "400", "600", "500", "1.20"]
    assert lines[2].split() == ["b", "100", "-", "-"]
    assert lines[3].split()[-3:] == ["1.00", "1.50", "1.25"]
    assert lines[4:] == ["b: new: it hung", "b: cuDNN: no"]


def test_cells_have_names_of_their_own() -> None:
    assert len({each.name for each in GRID}) == len(GRID)
    assert {(each.head_dim, each.backward) for each in GRID} == {(head_dim, each) for head_dim in calls.HEAD_DIMS for each in (False, True)}


def problem(**options: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    shape, dtype = options.pop("shape", (1, 2, 128, 64)), options.pop("dtype", torch.float16)
    q, k, v = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    return q, k, v, check(q, k, v, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": (3, None)}, "know no window_left"),
        ({"window": (None, 1)}, "know no window on the right"),
        ({"softcap": 2.0, "sinks": torch.zeros(2)}, "know no softcap, sinks"),
        ({"dropout_p": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.int64)}, "know no dropout_p"),
        ({"dtype": torch.float32}, "q is torch.float32"),
        ({"shape": (1, 2, 128, 80)}, "head_dim is 80"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"shape": (1, 2, 0, 64)}, "TMA reads no empty tensor"),
    ],
)
def test_experiments_say_what_they_do_not_take(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(NotImplementedError, match=expected):
        calls.check(*problem(**options))


def test_experiments_say_which_tensors_they_cannot_read() -> None:
    q, k, v, options = problem()
    calls.check(q, k, v, options)
    shifted = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view_as(k)
    for tensor in (k.transpose(2, 3).contiguous().transpose(2, 3), shifted):
        with pytest.raises(NotImplementedError, match="v has strides"):
            calls.check(q, k, tensor, options)
    with pytest.raises(NotImplementedError, match="contiguous"):
        warp_specialized.check(q, k, v, torch.zeros(1, 128, 2, 64, dtype=q.dtype).transpose(1, 2), options)
    q, k, v, options = problem(shape=(1, 2, 192, 64))
    with pytest.raises(NotImplementedError, match="192 queries and 192 keys: give multiples of 128"):
        warp_specialized.check(q, k, v, q, options)


@pytest.mark.slow
def test_a_rehearsal_races_what_can_be_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(driver, "_environment", lambda: {"gpu": {"name": "NVIDIA H200"}})
    record = tmp_path / "0.jsonl"
    assert (
        driver.main(["--rehearse", "--cells", "d128 causal 4k", "d128 causal 4k dk dv", "--out", str(tmp_path), "--record", str(record)])
        == 0
    )
    forward, gradients = json.loads((tmp_path / "nvidia-h200" / "experiments.json").read_text())["cells"]
    assert set(forward["error_share"]) == {PLAIN, "s-ahead"}
    assert set(forward["tflops"]) >= {PLAIN, "s-ahead"}
    assert set(gradients["tflops"]) == set(gradients["error_share"]) == {PLAIN, "by TMA"}
    assert [json.loads(line)["event"] for line in record.read_text().splitlines()] == ["began", "ended"] * 2
    assert capsys.readouterr().out.splitlines()[1].startswith("d128 causal 4k ")


def test_what_began_before_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_environment", dict)
    asked = []
    monkeypatch.setattr(driver, "run_cell", lambda command, lost, limit: asked.append(command[-1]) or [])
    choice = ["--cells", GRID[0].name, GRID[1].name, "--out", str(tmp_path), "--record", str(tmp_path / "0.jsonl")]
    assert driver.main(choice) == driver.main(choice) == 0
    assert asked == [GRID[0].name, GRID[1].name]
    late = ["--cells", GRID[2].name, "--until", "0", "--out", str(tmp_path), "--record", str(tmp_path / "0.jsonl")]
    assert driver.main(late) == 0
    assert len(asked) == 2
    assert json.loads((tmp_path / "0.jsonl").read_text().splitlines()[-1])["outcome"] == "left out"
