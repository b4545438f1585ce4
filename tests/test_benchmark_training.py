"""The benchmark's training run: twins agree, and a layer that computes something else is found."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from fused_attention.benchmarks import timing, training
from torch import Tensor

import fused_attention

ONCE = timing.Protocol(least_rounds=2, most_rounds=2, budget=0.0)


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "HEADS": 2, "LAYERS": 1, "CONTEXT": 16, "BATCH": 2, "SAMPLE_BYTES": 5, "CORPUS_BYTES": 20_000}.items():
        monkeypatch.setattr(training, name, value)


def test_training_twins_agree(small_training: None) -> None:
    made = training.train(12, ONCE, seed=0)
    assert made.failures == []
    assert len(made.losses) == len(made.torch_losses) == 12
    assert made.early_difference < 1e-5
    json.dumps(asdict(made), allow_nan=False)


def test_training_finds_a_layer_that_looks_ahead(small_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class LooksAhead(fused_attention.TransformerLayer):
        def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(src)

    monkeypatch.setattr(fused_attention, "TransformerLayer", LooksAhead)
    assert any("differ by" in failure for failure in training.train(12, ONCE, seed=0).failures)


@pytest.mark.parametrize(
    ("early", "late", "twin", "losses", "word"),
    [
        (2e-3, 2.0, 2.0, [5.0, 2.0], "differ by"),
        (math.nan, 2.0, 2.0, [5.0, 2.0], "differ by"),
        (1e-4, 2.0, 2.1, [5.0, 2.0], "within 1 %"),
        (1e-4, 2.0, 2.0, [5.0, math.inf], "not finite"),
        (1e-4, 5.0, 5.0, [5.0, 5.0], "nothing was learned"),
    ],
)
def test_training_conditions(early: float, late: float, twin: float, losses: list[float], word: str) -> None:
    assert [word in failure for failure in training.judge(early, late, twin, losses)] == [True]
    assert training.judge(1e-4, 2.0, 2.01, [5.0, 2.0]) == []
