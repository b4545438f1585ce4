"""The races behind the goals run and compute the same thing; a goal is missed where a rival is too near in most runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fused_attention.benchmarks import goals, goals_judged, goals_narrow, library_races, races
from fused_attention.benchmarks.timing import Protocol, Timing

from .cpu_calls import compiled

FEW = {goal.title: goal for goal in goals.goals(shrink=32)}
UNLIKE = ("packed", "visible pair", "S16", "checks")  # laid out in unlike ways, of unlike work, or many calls


class Once:
    """A protocol whose every call takes a second, our own less: by one of the ratios after the other."""

    def __init__(self, *ratios: float) -> None:
        self.ratios = list(ratios)

    def time_in_turns(self, functions):
        ratio = self.ratios.pop(0)
        seconds = {name: 1.0 if name != races.OURS else 1.0 / ratio for name in functions}
        return {name: Timing.of([second]) for name, second in seconds.items()}, {name: call() for name, call in functions.items()}


def race_of(goal):
    try:
        return goal.race()
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def beside(rival, race=lambda: races.Race({races.OURS: int, "them": int}), must=2.3):
    return goals.Goal("some", race, {rival: must}, {})


@compiled
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("title", FEW)
def test_contenders_of_a_race_agree(title):
    race = race_of(FEW[title])
    with torch.enable_grad() if race.learns else torch.no_grad():
        results = {name: call() for name, call in race.calls.items() if name != races.PEAK}
    assert set(FEW[title].must) <= set(race.calls) | set(race.allowed)
    if any(word in title for word in UNLIKE):
        return
    ours = results.pop(race.ours)
    for name, theirs in results.items():
        for got, expected in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
            scale = expected.abs().max()
            tolerance = 1e-4 if got.dtype is torch.float32 else 4e-2
            assert (got - expected).abs().max() <= tolerance * scale, name


def test_packed_contenders_agree():
    race = races.packed_race((5, 23, 9), "fp32")
    ours, padded, single = (race.calls[name]() for name in (races.OURS, "padded, with a mask", "one by one"))
    for number, (rows, alone) in enumerate(zip(ours.split((5, 23, 9)), single, strict=True)):
        torch.testing.assert_close(rows.transpose(0, 1)[None], alone)
        torch.testing.assert_close(padded[number : number + 1, :, : len(rows)], alone)


@pytest.mark.parametrize(
    ("ratios", "met"), [((4.0,), True), ((2.25,), True), ((2.2,), False), ((2.2, 2.4, 2.3), True), ((2.2, 9.0, 2.2), False)]
)
def test_a_goal_is_met_within_three_percent_by_the_median_of_the_runs(ratios, met):
    found = goals_judged.judge([beside("them")], Once(*ratios), len(ratios))
    (result,) = found.results
    assert result.ratio == pytest.approx(sorted(ratios)[len(ratios) // 2])
    assert result.met is met
    assert result.as_json()["ratios"] == pytest.approx(ratios)
    assert json.loads(json.dumps(result.as_json()))["met"] is met
    assert goals_judged.table(found.results).row_count == 1


def test_a_call_may_take_no_more_than_it_is_allowed():
    race = races.Race({races.OURS: int}, allowed={"half a second": 0.5})
    (result,) = goals_judged.judge([beside("half a second", lambda: race, 1.0)], Once(4.0), 1).results
    assert (result.ratio, result.met) == (2.0, True)


def test_a_race_that_cannot_be_run_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    goal = next(goal for title, goal in FEW.items() if library_races.ONNXRUNTIME in title)
    results, left_out = goals_judged.judge([goal], Once(1.0), 1)
    assert not results
    assert "`pip install onnxruntime onnx`" in left_out[goal.title]


def test_flex_attention_without_a_compiler_is_left_out_with_its_reason(monkeypatch):
    def fails():
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setattr(library_races, "flex", lambda inputs, compiled: SimpleNamespace(forward=fails))
    with pytest.raises(NotImplementedError, match=r"does not compile here: no working C\+\+ compiler$"):
        library_races.flex_race(goals.TINY)


def test_an_option_is_judged_by_the_pairs_it_sees():
    race = SimpleNamespace(**vars(races.option_race(goals.FULL[1], "kv_lengths")))
    assert race.weights == {"kv_lengths": pytest.approx(4 / 3), "ours, plain": 1.0}


@compiled
def test_the_peak_is_raced_with_as_many_operations():
    from fused_attention import _cpu

    assert _cpu.multiply_adds(3) == 3 * _cpu.multiply_adds(1) > 0
    goal = next(goal for goal in FEW.values() if races.PEAK in goal.must)
    assert goal.race().calls[races.PEAK]() == pytest.approx(goal.flops, rel=1e-2)


@compiled
def test_narrow_goals_come_back_from_their_process(monkeypatch, capsys):
    few = list(goals.narrow_goals(shrink=64))[:2]
    monkeypatch.setattr(goals_narrow, "narrow_goals", lambda: few)
    monkeypatch.setattr(goals_narrow.subprocess, "run", run_here(capsys))
    results, left_out = goals_narrow.judge_narrow(2, Protocol(least_rounds=1, budget=0.0))
    assert [result.title for result in results] == [f"avx2: {goal.title}" for goal in few]
    assert all(len(result.runs) == 2 and result.ratio > 0 for result in results)
    assert not left_out


def run_here(capsys):
    def run(command, *, env, **_):
        assert env["FUSED_ATTENTION_CPU_ISA"] == "avx2"
        assert importlib.util.find_spec(command[2]) is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            patch.setattr(goals_narrow, "keep_freed_memory", str)  # of this process, which has other tests to run
            goals_narrow.main()
        return SimpleNamespace(returncode=0, stdout=capsys.readouterr().out)

    return run


def test_a_cpu_without_the_narrow_instructions_leaves_them_out(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: this CPU can run baseline")
    monkeypatch.setattr(goals_narrow.subprocess, "run", lambda *_, **__: failed)
    assert goals_narrow.judge_narrow(1, Protocol()) == ([], {"the avx2 kernels": "RuntimeError: this CPU can run baseline"})
