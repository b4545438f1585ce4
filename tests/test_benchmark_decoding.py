"""The races of decoding run, and compute the same token; what a token reads is counted from the weights and caches themselves."""

from __future__ import annotations

import pytest
import torch
from fused_attention.benchmarks import decoding
from fused_attention.benchmarks.timing import Protocol

ROWS = {row.title: row for row in decoding.rows(shrink=16)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    config = decoding.GPTConfig(vocabulary=40, context=64, width=32, heads=2, layers=2, dropout=0.0)
    monkeypatch.setattr(decoding, "CONFIG", config)
    decoding._model.cache_clear()
    yield
    decoding._model.cache_clear()


@pytest.mark.parametrize("title", ROWS)
def test_contenders_of_a_race_agree(title):
    """Twice, for a call must leave its cache as it was."""
    race = ROWS[title].race()
    assert set(race.calls) == {race.ours, *ROWS[title].must}
    with torch.no_grad():
        first, second = ({name: call() for name, call in race.calls.items()} for _ in range(2))
    for name, logits in second.items():
        assert torch.equal(logits, first[name])
        if "beside" not in title:  # whose tokens follow unlike texts
            tolerance = 1e-5 if logits.dtype is torch.float32 else 2e-2
            torch.testing.assert_close(logits, first[race.ours], rtol=tolerance, atol=tolerance)
    assert race.run(Protocol(least_rounds=1, most_rounds=1, budget=0.0)).keys() == race.calls.keys()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_token_reads_the_weights_and_the_caches(dtype):
    model, config = decoding._model(dtype), decoding.CONFIG
    matrices = [x for name, x in model.named_parameters() if x.dim() == 2 and "positions" not in name]
    caches = decoding._paged(48, dtype)
    held = [x for cache in caches.text for x in (cache.k, cache.v)]
    assert decoding.token_bytes(48, dtype) == sum(x.numel() * x.element_size() for x in (*matrices, *held))
    assert config.layers == len(caches.text)
