"""The races behind the goals run and compute the same thing; a goal is missed where a rival is too near."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fused_attention.benchmarks import goals, races
from fused_attention.benchmarks.timing import Timing

FEW = {goal.title: goal for goal in goals.goals(shrink=32)}


class Once:
    """A protocol whose every call takes a second, our own `ratio` times less."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def time_in_turns(self, functions):
        seconds = {name: 1.0 if name != races.OURS else 1.0 / self.ratio for name in functions}
        return {name: Timing.of([second]) for name, second in seconds.items()}, {name: call() for name, call in functions.items()}


@pytest.mark.parametrize("title", FEW)
def test_contenders_of_a_race_agree(title):
    race = FEW[title].race()
    with torch.enable_grad() if race.learns else torch.no_grad():
        results = {name: call() for name, call in race.calls.items()}
    assert set(FEW[title].must) <= set(results)
    if "packed" in title or "visible pair" in title or "S16" in title:
        return  # laid out in unlike ways, of unlike work, or many calls
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


@pytest.mark.parametrize(("ratio", "met"), [(4.0, True), (2.25, True), (2.2, False)])
def test_a_goal_is_met_within_three_percent(ratio, met):
    goal = goals.Goal("some", lambda: races.Race({races.OURS: int, "them": int}), {"them": 2.3}, {})
    (result,) = goals.judge(goal, Once(ratio))
    assert result.ratio == pytest.approx(ratio)
    assert result.met is met
    assert goals.table([result]).row_count == 1


def test_an_option_is_judged_by_the_pairs_it_sees():
    race = SimpleNamespace(**vars(races.option_race(goals.FULL[1], "kv_lengths")))
    assert race.weights == {"kv_lengths": pytest.approx(4 / 3), "ours, plain": 1.0}
