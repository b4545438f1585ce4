"""The races behind the goals run and compute the same thing; a goal is missed where a rival is too near in most runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fused_attention.benchmarks import command, decoding, goals, goals_judged, goals_narrow, library_races, races
from fused_attention.benchmarks.timing import Protocol, Timing

from .cpu_calls import compiled

ALL = {goal.title: goal for goal in goals.goals(shrink=32)}
DECODING = {row.title: row for row in decoding.rows(shrink=32)}  # whose own test makes their model small
FEW = {title: goal for title, goal in ALL.items() if title not in DECODING}
UNLIKE = ("packed", "visible pair", "S16", "listeners")  # laid out in unlike ways, of unlike work, or many calls


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

    monkeypatch.setattr(library_races, "flex", lambda *_, **__: SimpleNamespace(forward=fails))
    with pytest.raises(NotImplementedError, match=r"does not compile here: no working C\+\+ compiler$"):
        library_races.flex_race(goals.TINY)


@pytest.fixture
def compilations(monkeypatch):
    """How often flex_attention was compiled, by whoever stands in for the compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    made = []
    monkeypatch.setattr(library_races, "compiled_flex", lambda: made.append(1) or flex_attention)
    library_races._compiled.cache_clear()
    yield made
    library_races._compiled.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_each_run_has_inputs_of_its_own_and_none_compiles_again(compilations):
    first, second = (library_races.flex_race(goals.TINY).calls[library_races.FLEX] for _ in range(2))
    assert len(compilations) == 1
    assert torch.equal(first(), second())
    held = [next(cell.cell_contents for cell in call.__closure__ if hasattr(cell.cell_contents, "dout")) for call in (first, second)]
    assert held[0].q.data_ptr() != held[1].q.data_ptr()


@pytest.mark.parametrize("faulty", ["ours", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_wrong_beside_a_library_shows_no_speed(faulty, monkeypatch):
    """A library's mistake leaves the race out, one of ours ends the command."""
    right = getattr(library_races, faulty)

    def wrong(*given, **options):
        run = right(*given, **options)
        return SimpleNamespace(forward=lambda: run.forward() + 0.1)

    monkeypatch.setattr(library_races, faulty, wrong)
    error, sentence = (
        (RuntimeError, "ours is wrong") if faulty == "ours" else (NotImplementedError, "flex_attention is wrong here: out is off by")
    )
    with pytest.raises(error, match=sentence) as raised:
        library_races.flex_race(goals.TINY, compiled=False)
    assert raised.type is error  # for one is a kind of the other


def test_decoding_is_among_the_goals():
    assert len(DECODING) == 8
    for title, row in DECODING.items():
        goal = ALL[title]
        assert (goal.must, goal.aim, goal.race.func) == (row.must, row.aim, row.race.func)


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


@compiled
def test_narrow_goals_are_timed_with_as_many_threads(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(
        goals_narrow, "judge", lambda goals, protocol, runs: told.append((protocol, runs)) or goals_judged.Judged([], {"a": "b"})
    )
    monkeypatch.setattr(goals_narrow.torch, "set_num_threads", told.append)
    monkeypatch.setattr(goals_narrow.subprocess, "run", run_here(capsys))
    protocol = Protocol(threads=2, least_rounds=3, budget=0.25)
    assert goals_narrow.judge_narrow(4, protocol) == ([], {"avx2: a": "b"})  # what the process left out comes back with its reason
    assert told == [2, (protocol, 4)]


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


@compiled
def test_a_cpu_without_the_narrow_instructions_leaves_them_out(monkeypatch, capsys):
    from fused_attention import _cpu

    def isa():
        raise RuntimeError("FUSED_ATTENTION_CPU_ISA is 'avx2', and this CPU can run baseline")

    monkeypatch.setattr(_cpu, "isa", isa)
    monkeypatch.setattr(goals_narrow.subprocess, "run", run_here(capsys))
    results, left_out = goals_narrow.judge_narrow(1, Protocol())
    assert not results
    assert left_out == {"avx2: every goal": "FUSED_ATTENTION_CPU_ISA is 'avx2', and this CPU can run baseline"}


@pytest.mark.parametrize(
    ("status", "said", "sentence"),
    [
        (1, "Traceback\nRuntimeError: ours is wrong beside it", r"ended with status 1: Traceback\nRuntimeError: ours is wrong beside it$"),
        (-11, "", "ended by SIGSEGV: it said nothing$"),
    ],
)
def test_narrow_goals_that_fail_are_not_left_out(status, said, sentence, monkeypatch):
    monkeypatch.setattr(goals_narrow.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=status, stderr=said))
    with pytest.raises(RuntimeError, match=sentence):
        goals_narrow.judge_narrow(1, Protocol())


def parsed(*given):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def one_goal(monkeypatch):
    """The command with a single goal, whose race takes no time."""
    monkeypatch.setattr(command, "keep_freed_memory", lambda: "untouched")
    monkeypatch.setattr(command, "best_gemm", lambda *_: 1e9)
    monkeypatch.setattr(
        command,
        "goals",
        lambda: [goals.Goal("some", lambda: races.Race({races.OURS: int}, allowed={"an hour": 3600.0}), {"an hour": 1.0}, {})],
    )


def test_what_was_found_is_kept_when_the_narrow_goals_fail(one_goal, monkeypatch, tmp_path, capsys):
    def fails(runs, protocol):
        raise RuntimeError("ended by SIGSEGV")

    monkeypatch.setattr(command, "judge_narrow", fails)
    path = tmp_path / "made.json"
    with pytest.raises(RuntimeError, match="SIGSEGV"):
        command.run(parsed("--device", "cpu", "--quick", "--json", str(path)))
    assert [goal["title"] for goal in json.loads(path.read_text())["goals"]] == ["some"]
    assert "met" in capsys.readouterr().out


def test_the_goals_of_both_processes_come_together(one_goal, monkeypatch, tmp_path, capsys):
    told = []
    missed = goals_judged.Result("avx2: some", "them", (goals_judged.Pair(1.0, 0.5),), 1.0, None)
    monkeypatch.setattr(
        command, "judge_narrow", lambda runs, protocol: told.append((runs, protocol.threads)) or goals_judged.Judged([missed], {"x": "why"})
    )
    path = tmp_path / "made.json"
    assert command.run(parsed("--device", "cpu", "--runs", "2", "--threads", "2", "--json", str(path))) == 1
    content = json.loads(path.read_text())
    assert [goal["title"] for goal in content["goals"]] == ["some", "avx2: some"]
    assert content["left_out"] == {"x": "why"}
    assert told == [(2, 2)]
    assert "1 of 2 goals met, 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--device", "cpu", "--seed", "3"), "--seed is given, and the goals (--device, --preset) have no use for it"),
        (("--preset", "modules", "--no-plot"), "--no-plot is given, and the goals"),
        (("--runs", "2"), "--runs is given, and only the goals have a use for it: add --device cpu"),
    ],
)
def test_no_argument_is_ignored(given, sentence, capsys):
    assert command.run(parsed(*given)) == 2
    assert sentence in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--runs", "--threads"])
def test_numbers_below_one_are_refused_for_what_they_are(option, capsys):
    with pytest.raises(SystemExit):
        parsed(option, "0")
    assert f"argument {option}: got 0, expected an int of at least 1" in capsys.readouterr().err
