"""The GPU benchmark without a GPU: rivals are asked for the same, wrong ones show no speed, clock and report say what happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_attention.benchmarks import device_decoding, device_layers, device_report, device_timing
from fused_attention.benchmarks.contenders import OURS, Contender, Run
from fused_attention.benchmarks.device_workloads import HOST, ITEMS, rehearsal
from fused_attention.benchmarks.gate import AttentionGate
from fused_attention.benchmarks.measure import measure
from fused_attention.benchmarks.record import Record
from fused_attention.benchmarks.rivals import FLEX, device_contenders, sdpa
from fused_attention.benchmarks.timing import Protocol, Timing
from fused_attention.benchmarks.workloads import DTYPES, Workload, attention_inputs, visible_pairs

ONCE = Protocol(least_rounds=1, most_rounds=1, budget=0.0)
SMALL = {item.name: rehearsal(item).workload for item in ITEMS}


def test_processes_share_a_list_without_doing_anything_twice(tmp_path: Path) -> None:
    first, second = Record(tmp_path / "0.jsonl"), Record(tmp_path / "1.jsonl")
    assert first.claim("a")
    assert not second.claim("a")
    assert second.claim("b")
    assert not Record(tmp_path / "0.jsonl").claim("a")  # after a crash
    first.ended("a", "passed", rows=[])
    lines = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [(line["name"], line["event"]) for line in lines] == [("a", "began"), ("a", "ended")]
    assert Record(None).claim("a")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SMALL)
def test_flex_is_asked_for_the_same(name: str) -> None:
    """Uncompiled and forward alone, which is what it does on a CPU."""
    workload = replace(SMALL[name], backward=False)
    field = [contender for contender in device_contenders(workload, compiled=False) if contender.name in (OURS, FLEX, "math")]
    rows = {row.contender: row for row in measure(workload, "attention", ("fp32", torch.float32), field, ONCE, seed=0)}
    assert rows[OURS].timing is not None
    assert rows[FLEX].timing is not None, rows[FLEX].reason
    assert rows["math"].timing is not None or workload.softcap is not None or workload.lengths is not None, rows["math"].reason


@pytest.mark.parametrize("name", SMALL)
def test_pairs_are_counted_as_they_are_visible(name: str) -> None:
    workload = SMALL[name]
    inputs = attention_inputs(workload, torch.float32, 0)
    if workload.lengths is not None:
        counted = sum(length * (length + 1) // 2 for length in workload.lengths) * workload.heads
    else:
        shape = (workload.batch, workload.heads, workload.seqlen_q, workload.seqlen_k)
        every = torch.ones(shape, dtype=torch.bool)
        counted = int((every if inputs.visible is None else every & inputs.visible).sum())
    assert visible_pairs(workload) == counted


@pytest.mark.parametrize("name", ["window-8k bf16", "bias-1k bf16", "packed-8k bf16", "gemma-4k bf16"])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_wrong_contender_shows_no_speed(name: str, in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the whole is judged in blocks, without a slice."""
    if in_blocks:
        monkeypatch.setattr("fused_attention.benchmarks.gate.LARGEST_SLICE", 0)
        monkeypatch.setattr("fused_attention.benchmarks.gate.LARGEST_WHOLE", 0)
    workload = SMALL[name]
    ours = device_contenders(workload)[0]

    def wrong(inputs: Any) -> Run:
        right = ours.prepare(inputs)
        return replace(right, forward=lambda: right.forward() * 1.2)

    rows = measure(workload, "attention", ("fp32", torch.float32), [ours, Contender("wrong", "attention", wrong)], ONCE, seed=0)
    assert [row.failed for row in rows] == [False, False, True, True], [row.reason for row in rows]
    assert all(row.timing is None for row in rows[2:])


def test_our_cuda_kernels_race_too_and_say_where_they_can_not() -> None:
    cuda = next(contender for contender in device_contenders(SMALL["window-8k bf16"]) if contender.name == "ours, cuda")
    rows = measure(SMALL["window-8k bf16"], "attention", ("bf16", torch.bfloat16), [cuda], ONCE, seed=0)
    assert {row.contender for row in rows} == {"ours, cuda"}
    assert all(not row.failed and row.timing is None and "backend='cuda' can't run this call" in str(row.reason) for row in rows)


def test_the_gradient_of_a_bias_is_judged() -> None:
    inputs = attention_inputs(SMALL["bias-1k bf16"], torch.float32, 0)
    gate, made = AttentionGate(inputs), device_contenders(inputs.workload)[0].prepare(inputs)
    gradients = dict(zip(made.leaves, torch.autograd.grad(made.forward(), tuple(made.leaves.values()), made.dout), strict=True))
    assert gate.judge(gradients, bounded=True)["backward"].failure is None
    assert "dbias is off by" in str(gate.judge({"dbias": gradients["dbias"] * 1.1}, bounded=True)["backward"].failure)


def test_a_rival_that_cannot_go_backward_still_goes_forward() -> None:
    def forward_alone(inputs: Any) -> Run:
        right = sdpa(inputs, torch.nn.attention.SDPBackend.MATH)
        return replace(right, leaves={"dq": torch.zeros(1, requires_grad=True)})

    field = [Contender("forward alone", "attention", forward_alone)]
    forward, backward = measure(SMALL["gpt2-1k bf16"], "attention", ("fp32", torch.float32), field, ONCE, seed=0)
    assert forward.timing is not None
    assert backward.timing is None
    assert "appears to not have been used" in str(backward.reason)


def test_device_times_are_those_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock["now"]

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    def spend(seconds: float) -> None:
        clock["now"] += seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: spend(100.0))
    monkeypatch.setattr(device_timing, "FLUSHED_BYTES", 16)
    protocol = device_timing.DeviceProtocol(device="cpu", least_rounds=3, most_rounds=3)
    timings, last = protocol.time_in_turns({"a": lambda: spend(1.0) or "a", "b": lambda: spend(2.0) or "b"})
    assert (timings["a"].median, timings["b"].median, timings["a"].rounds) == (1.0, 2.0, 3)
    assert last == {"a": "a", "b": "b"}


def row(contender: str, direction: str, seconds: float | None, **facts: Any) -> dict[str, Any]:
    timing = None if seconds is None else {"median": seconds}
    speed = None if seconds is None else 1e12 / seconds
    base = {"contender": contender, "direction": direction, "timing": timing, "flops_per_second": speed, "failed": False, "reason": None}
    return base | {"error_share": 0.1, "over_rival": None, "dtype": "bf16"} | facts


def test_the_report_shows_every_contender() -> None:
    decode = {"batch": 2, "heads": 8, "kv_heads": 4, "seqlen_q": 1, "seqlen_k": 1024, "head_dim": 64}
    entries = [
        {
            "name": "gpt2 bf16",
            "workload": {"seqlen_q": 1024},
            "rows": [
                row(OURS, "forward", 2e-3, over_rival=0.5),
                row("cuDNN", "forward", 1e-3),
                row("flash", "forward", None, error_share=None, reason="NotImplementedError: too old"),
                row(OURS, "backward", None, failed=True, reason="dq is off"),
                row("cuDNN", "backward", 4e-3),
                row("flash", "backward", None, error_share=None, reason="NotImplementedError: too old"),
            ],
        },
        {"name": "decode bf16", "workload": decode, "rows": [row(OURS, "forward", 1e-6), row("cuDNN", "forward", 2e-6)]},
        {
            "name": "layer-1k",
            "layer_steps": {
                OURS: {"milliseconds": 2.0, "extra_bytes": 3 * 2**20},
                "torch.nn": {"milliseconds": 5.0, "extra_bytes": 6 * 2**20},
                "torch.nn, cuDNN": {"reason": "RuntimeError: no such kernel"},
            },
        },
        {
            "name": "decoding-16x8k",
            "shape": "batch 16",
            "decoding_steps": {
                "in a row": {"microseconds": 120.04, "bytes_per_second": 4e12, "copy_share": 0.914},
                "pages of 16": {"microseconds": 150.0, "bytes_per_second": 3.2e12, "copy_share": 0.731},
            },
        },
        {"name": "host time", "host_microseconds": {OURS: {"inference": 9.6, "training": 40.2}, "flex": None}},
        {"name": "lost fp32", "message": "OutOfMemoryError: 3 GiB"},
    ]
    lines = [line.split() for line in device_report.report(entries).splitlines()]
    assert ["gpt2", "bf16", "forward", "500", "1000", "-", "0.50"] in lines
    assert ["backward", "wrong", "250", "-"] in [line[2:] for line in lines]
    assert ["decode", "bf16", "forward", "2097", "1049"] in lines
    assert ["forward,", "no", "gradients", "10", "-"] in lines
    assert ["milliseconds", "2", "5", "-", "2.50"] in lines
    assert ["MiB", "at", "most", "3", "6", "-", "2.00"] in lines
    assert ["microseconds", "120.0", "150.0"] in lines
    assert ["GB/s", "of", "k", "and", "v", "4000", "3200"] in lines
    assert ["of", "a", "copy's", "91%", "73%"] in lines
    text = device_report.report(entries)
    assert "torch.nn, cuDNN: RuntimeError: no such kernel (layer-1k)" in text
    assert "flash: NotImplementedError: too old (gpt2 bf16)" in text
    assert f"{OURS}: dq is off (gpt2 bf16)" in text
    assert "lost fp32: OutOfMemoryError: 3 GiB" in text


@pytest.mark.parametrize("layer", device_layers.LAYERS, ids=lambda layer: layer.name)
def test_a_training_step_of_a_layer_is_judged_before_it_is_timed(layer: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    small = device_layers.rehearsal_of(layer)
    found = device_layers.race(small, "fp32", ONCE)["layer_steps"]
    assert list(found) == [OURS, "torch.nn"]
    assert all(facts["milliseconds"] > 0 and facts["error_share"] <= 1 for facts in found.values())
    steps, gate = device_layers.steps_of(small, "fp32", "cpu")
    wrong = {name: (lambda step=step: {name: 2 * tensor for name, tensor in step().items()}) for name, step in steps.items()}
    monkeypatch.setattr(device_layers, "steps_of", lambda *_: (steps | {"torch.nn": wrong["torch.nn"]}, gate))
    assert "errs by" in device_layers.race(small, "fp32", ONCE)["layer_steps"]["torch.nn"]["reason"]
    monkeypatch.setattr(device_layers, "steps_of", lambda *_: (wrong, gate))
    with pytest.raises(RuntimeError, match="errs by"):
        device_layers.race(small, "fp32", ONCE)


@pytest.mark.parametrize("decoding", device_decoding.DECODINGS, ids=lambda decoding: decoding.name)
def test_a_step_of_decoding_is_judged_before_it_is_timed(decoding: device_decoding.Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    small = device_decoding.rehearsal_of(decoding)
    found = device_decoding.race(small, "fp32", ONCE)["decoding_steps"]
    assert list(found) == ["in a row", "pages of 16", "pages of 256"]
    for facts in found.values():
        assert facts["error_share"] <= 1.0
        read = 2 * small.batch * small.kv_heads * small.keys * small.head_dim * 4
        assert facts["bytes_per_second"] * facts["microseconds"] == pytest.approx(1e6 * read)
    steps, inputs = device_decoding.steps_of(small, "fp32", "cpu")
    assert steps["copy"]().numel() == 2 * inputs.k.numel()
    right = steps["pages of 16"]
    monkeypatch.setattr(device_decoding, "steps_of", lambda *_: (steps | {"pages of 16": lambda: 1.01 * right()}, inputs))
    with pytest.raises(RuntimeError, match=r"pages of 16: out uses .* times its bound"):
        device_decoding.race(small, "fp32", ONCE)


def test_a_share_is_that_of_a_copy_of_as_many_bytes() -> None:
    """A step that takes as long as the copy, which reads and writes what the step only reads, reaches half of it."""
    small = device_decoding.rehearsal_of(device_decoding.DECODINGS[0])

    class Alike(Protocol):
        def time_in_turns(self, functions: Any) -> Any:
            return {name: Timing.of([1.0]) for name in functions}, {}

    found = device_decoding.race(small, "fp32", Alike())["decoding_steps"]
    assert {facts["copy_share"] for facts in found.values()} == {0.5}


def test_workloads_have_names_of_their_own() -> None:
    assert len(SMALL) == len(ITEMS)
    others = [named.name for named in (*device_layers.LAYERS, *device_decoding.DECODINGS)]
    assert len(SMALL.keys() | set(others)) == len(SMALL) + len(others)
    assert all(item.dtype in DTYPES for item in ITEMS)
    assert HOST.seqlen_q == 128
