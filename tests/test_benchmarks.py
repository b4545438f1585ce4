"""The benchmark's own conscience: a wrong contender shows no speed, times are what was measured, files hold what they promise."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_attention

pytest.importorskip("rich", reason="the benchmark's table needs rich: pip install 'fused-attention[bench]'")
pytest.importorskip("matplotlib", reason="the benchmark's plot needs matplotlib: pip install 'fused-attention[bench]'")

from fused_attention.benchmarks import command, comparison, contenders, environment, plot, report, timing, workloads
from fused_attention.benchmarks.contenders import NAIVE, OURS, Contender, Run, naive_attention
from fused_attention.benchmarks.measure import Row, measure, with_ratios
from fused_attention.benchmarks.workloads import AttentionInputs, Workload

FP32 = ("fp32", torch.float32)
ONCE = timing.Protocol(least_rounds=2, most_rounds=2, budget=0.0)
CAUSAL = Workload("tiny-causal", "tiny causal", 2, 6, 23, 23, 16, kv_heads=3, causal=True)
PADDED = Workload("tiny-padded", "tiny padded", 2, 4, 19, 29, 8, kv_lengths=(29, 11))
SQUARE = Workload("tiny-square", "tiny square", 2, 2, 21, 21, 8, causal=True, module="layer")
CROSS = Workload("tiny-cross", "tiny cross", 2, 2, 5, 13, 8, module="attention")


@pytest.fixture(autouse=True)
def leave_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark sets malloc up for good; other tests measure memory."""
    monkeypatch.setattr(command, "keep_freed_memory", lambda: "untouched")
    for workload in (CAUSAL, PADDED, SQUARE, CROSS):
        monkeypatch.setitem(workloads.WORKLOADS, workload.name, workload)


def planted(function: Callable[..., Tensor], *, ours: bool = True, lse: Callable[[Tensor], Tensor] | None = None) -> Contender:
    """A contender that computes function(q, k, v, visible); lse changes what attention_with_lse says."""

    def prepare(inputs: AttentionInputs) -> Run:
        q, k, v = inputs.q, inputs.k, inputs.v

        def changed_lse() -> Tensor:
            true = fused_attention.attention_with_lse(q, k, v, **inputs.options).lse
            return true if lse is None else lse(true)

        return Run(
            lambda: function(q, k, v, inputs.visible),
            {"dq": q, "dk": k, "dv": v},
            inputs.dout,
            lse=changed_lse if lse is not None else None,
        )

    return Contender("planted", "attention", prepare, ours=ours)


class _WrongGradient(torch.autograd.Function):
    """The identity forward; backward a gradient that is a hundredth too long."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def one_wrong_head(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Wrong where the float64 slice does not look."""
    out = naive_attention(q, k, v, visible)
    return torch.cat([out[:, :1] * 1.5, out[:, 1:]], dim=1)


FAULTS: dict[str, tuple[Contender, set[str]]] = {
    "not causal": (planted(lambda q, k, v, visible: naive_attention(q, k, v, None)), {"forward", "backward"}),
    "scale forgotten": (planted(lambda q, k, v, visible: naive_attention(q * 4, k, v, visible)), {"forward", "backward"}),
    "a ten-thousandth too large": (planted(lambda q, k, v, visible: naive_attention(q, k, v, visible) * 1.0001), {"forward", "backward"}),
    "first head wrong": (planted(one_wrong_head), {"forward", "backward"}),
    "dk a hundredth too large": (planted(lambda q, k, v, visible: naive_attention(q, _WrongGradient.apply(k), v, visible)), {"backward"}),
    "lse in base 2": (planted(naive_attention, lse=lambda lse: lse / math.log(2)), {"forward"}),
    "nan": (planted(lambda q, k, v, visible: naive_attention(q, k, v, visible) + math.nan), {"forward"}),
    "a rival's nan": (planted(lambda q, k, v, visible: naive_attention(q, k, v, visible) + math.nan, ours=False), {"forward"}),
    "another shape": (
        planted(lambda q, k, v, visible: naive_attention(q, k, v, visible).transpose(0, 1).contiguous()),
        {"forward", "backward"},
    ),
    "another rival": (planted(lambda q, k, v, visible: naive_attention(q, k, v, None), ours=False), {"forward", "backward"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_contender_shows_no_speed(fault: str) -> None:
    contender, directions = FAULTS[fault]
    workload = replace(CAUSAL, backward=fault != "another shape")
    rows = measure(workload, "attention", FP32, [contender, *contenders.contenders("attention")], ONCE, seed=0)
    for row in rows:
        wrong = row.contender == "planted" and row.direction in directions
        assert row.failed == wrong, row
        assert (row.timing is None) == wrong
        assert (row.flops_per_second is None) == wrong
        assert (row.over_naive is None) == (row.over_rival is None) == wrong
        assert (row.reason is not None) == wrong


def test_a_rival_may_be_less_exact_than_ours() -> None:
    contender, _ = FAULTS["a ten-thousandth too large"]
    rows = measure(CAUSAL, "attention", FP32, [replace(contender, ours=False)], ONCE, seed=0)
    assert all(row.timing is not None and not row.failed for row in rows)
    assert max(row.error_share for row in rows) > 1.0


def refusing(inputs: AttentionInputs) -> Run:
    raise NotImplementedError("it wants a GPU\nand a second line")


@pytest.mark.parametrize("ours", [False, True])
def test_a_contender_that_cannot_run_shows_its_reason(ours: bool) -> None:
    field = [Contender("planted", "attention", refusing, ours=ours), *contenders.contenders("attention")]
    rows = measure(PADDED, "attention", FP32, field, ONCE, seed=0)
    refused = [row for row in rows if row.contender == "planted"]
    assert [row.reason for row in refused] == ["NotImplementedError: it wants a GPU"] * 2
    assert [row.failed for row in refused] == [ours] * 2  # ours has to run every workload
    assert all(row.timing is not None for row in rows if row.contender != "planted")


def without_its_mask(inputs: Any, weights: nn.Module) -> Run:
    return contenders.run_module(weights, replace(inputs, workload=replace(inputs.workload, causal=False)), needs_mask=True)


def test_a_wrong_module_shows_no_speed() -> None:
    rows = measure(
        SQUARE, "module", FP32, [Contender("planted", "module", without_its_mask), *contenders.contenders("module")], ONCE, seed=0
    )
    assert {row.contender for row in rows if row.failed} == {"planted"}
    assert all((row.timing is None) == row.failed for row in rows)


@pytest.mark.parametrize(
    "workload", [SQUARE, CROSS, replace(SQUARE, causal=False, kv_lengths=(21, 9), norm_first=False)], ids=lambda w: w.name
)
def test_modules_of_both_run(workload: Workload) -> None:
    rows = measure(workload, "module", FP32, contenders.contenders("module"), ONCE, seed=0)
    assert [(row.contender, row.failed) for row in rows] == [(OURS, False)] * 2 + [("torch.nn", False)] * 2


def test_modules_without_grouped_heads_say_so() -> None:
    workload = workloads.WORKLOADS["llama-gqa"]
    assert [item.kind for item in command.plan([workload.name], None, quick=False)] == ["attention", "module"]
    (row,) = measure(workload, "module", FP32, contenders.contenders("module"), ONCE, seed=0)
    assert (row.timing, row.failed, row.reason) == (None, False, workload.module_reason)
    assert report.reasons([row]) == [f"llama-gqa module fp32, torch.nn: {workload.module_reason}"]


def test_speed_follows_from_the_time() -> None:
    for row in measure(PADDED, "attention", FP32, contenders.contenders("attention"), ONCE, seed=0):
        assert row.flops_per_second * row.timing.median == pytest.approx(workloads.attention_flops(PADDED, row.direction))


def test_ratios_are_to_naive_and_to_the_best_rival() -> None:
    medians = {OURS: 1.0, "torch SDPA": 4.0, NAIVE: 6.0}
    made = [
        Row("one", "attention", "fp32", direction, name, name == OURS, timing=timing.Timing.of([factor * median]))
        for direction, factor in (("forward", 1.0), ("backward", 3.0))
        for name, median in medians.items()
    ]
    silent = Row("one", "attention", "fp32", "forward", "absent", False, reason="none")
    *rows, last = with_ratios([*made, silent])
    assert [row.over_naive for row in rows] == [6.0, 1.5, 1.0] * 2
    assert [row.over_rival for row in rows] == [4.0, 1.0, 4.0 / 6.0] * 2
    assert (last.over_naive, last.over_rival) == (None, None)


def test_extra_memory_is_what_a_call_allocates() -> None:
    floats = 3 * 2**18

    def call() -> Tensor:
        temporary = torch.zeros(floats)
        return temporary[:10] + 1.0

    assert timing.peak_extra_bytes(call) == pytest.approx(4 * floats, rel=0.01)


@pytest.mark.parametrize("dtype", workloads.DTYPES.values(), ids=workloads.DTYPES)
def test_the_best_product_is_finite_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "GEMM_SIZE", 64)  # oneDNN refuses fp16 on some machines
    assert 0.0 < timing.best_gemm(dtype, ONCE) < math.inf


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings, _ = timing.time_in_turns(functions, timing.Protocol(least_rounds=3, most_rounds=3))
    assert "".join(calls) == "aabb" * 3  # an untimed call before each timed one
    assert {name: made.rounds for name, made in timings.items()} == {"a": 3, "b": 3}


def arguments(tmp_path: Path, *given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--json", str(tmp_path / "made.json"), *given])


def run_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: list[Contender], *given: str) -> int:
    monkeypatch.setattr(contenders, "CONTENDERS", tuple(field))
    monkeypatch.setattr(command, "QUICK_LENGTHS", (16, 32))
    monkeypatch.setattr(plot, "TOKENS", 32)
    monkeypatch.setattr(timing, "GEMM_SIZE", 64)
    return command.run(arguments(tmp_path, "--quick", "--workload", CAUSAL.name, "--dtype", "fp32", "--no-train", *given))


HONEST = [contender for contender in contenders.CONTENDERS if contender.kind == "attention"]


def test_a_run_writes_its_table_json_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(tmp_path, monkeypatch, HONEST) == 0
    shown = capsys.readouterr().out
    assert "every gate held" in shown
    assert "tiny causal · attention · fp32" in shown
    assert max(map(len, shown.splitlines())) <= command.REPORT_WIDTH
    for name in (OURS, "torch SDPA", NAIVE):
        assert sum(line.startswith(("forward", "backward", " ")) and f" {name} " in line for line in shown.splitlines()) == 2

    content = comparison.load(tmp_path / "made.json")
    assert content["passed"] is True
    assert len(content["rows"]) == 6
    assert len(content["sweep"]) == 2 * 2 * 2 * 3  # panels, lengths, directions, contenders
    for row in content["rows"] + content["sweep"]:
        assert set(row) == set(Row.__dataclass_fields__)
        assert set(row["timing"]) == {"median", "lower_quartile", "upper_quartile", "minimum", "rounds"}
        assert 0 < row["timing"]["minimum"] <= row["timing"]["lower_quartile"] <= row["timing"]["median"] <= row["timing"]["upper_quartile"]
        assert row["error_share"] >= 0
        assert row["extra_bytes"] > 0
    assert set(environment.COMPARED) | {"package", "seed", "date", "load_average", "best_gemm", "backends"} <= content["environment"].keys()

    picture = (tmp_path / "made.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000


def test_a_wrong_contender_makes_the_run_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    contender, _ = FAULTS["not causal"]
    assert run_tiny(tmp_path, monkeypatch, [contender, *HONEST], "--no-plot") == 1
    shown = capsys.readouterr().out
    assert "2 of the gates failed" in shown
    lines = [line for line in shown.splitlines() if " planted " in line and ": " not in line]
    assert [line.split()[-2] for line in lines] == ["wrong", "wrong"]
    assert json.loads((tmp_path / "made.json").read_text())["passed"] is False


def test_results_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made.json").write_text("kept")
    assert command.run(arguments(tmp_path, "--quick")) == 2
    assert "exists already" in capsys.readouterr().out
    assert (tmp_path / "made.json").read_text() == "kept"


def test_results_go_to_an_ignored_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    json_path, plot_path = command._paths(parser.parse_args([]))
    assert json_path.parent == plot_path.parent == command.OUTPUT_FOLDER
    assert (command.OUTPUT_FOLDER / ".gitignore").read_text() == "*\n"


def test_the_full_plan_covers_the_real_models() -> None:
    items = command.plan(None, None, quick=False)
    assert {(item.workload.name, item.dtype) for item in items if item.kind == "attention"} >= {
        (name, "fp32") for name in ("gpt2-small", "bert-base", "vit-base", "whisper-encoder", "whisper-cross", "llama-gqa", "decode-gqa")
    }
    assert any(item.dtype == "bf16" for item in items)
