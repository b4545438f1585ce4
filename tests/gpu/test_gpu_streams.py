"""How a call behaves among others: on the current stream, without waiting for the device, and inside a captured graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.testing import Case, Inputs

from .target import Target

SLEPT_CYCLES = 100_000_000  # some 50 milliseconds: whoever does not wait for the stream reads what was there before
WARM_UPS = 3
SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "seqlen_q": 259, "seqlen_k": 259, "head_dim": 64, "dtype": torch.bfloat16}
LENGTHS = (131, 259, 7, 64)
CASES = (
    Case("causal", **SHAPE, causal=True),
    Case("window-sinks", **SHAPE, causal=True, window=(100, None), sinks=True),
    Case("bias-mask", **SHAPE, bias="1hqk", mask="b11k"),
    Case("alibi-softcap-dropout", **SHAPE, alibi_slopes="h", softcap=20.0, dropout_p=0.1),
    Case("kv-lengths", **SHAPE, kv_lengths=(259, 100)),
    Case("decode", **(SHAPE | {"seqlen_q": 1, "seqlen_k": 4099}), kv_lengths=(4099, 100)),
    Case("packed", heads=8, kv_heads=2, lengths_q=LENGTHS, head_dim=64, causal=True, dtype=torch.bfloat16),
)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert got.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)], what


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_runs_on_the_current_stream(case: Case, gpu: Target) -> None:
    inputs = case.make(gpu.device)
    expected = inputs.run(gpu.backend)
    late = inputs.changed(q=torch.full_like(inputs.q, torch.nan), dout=torch.full_like(inputs.dout, torch.nan))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEPT_CYCLES)
        late.q.copy_(inputs.q)
        late.dout.copy_(inputs.dout)
        got = late.run(gpu.backend)
    side.synchronize()
    assert_equal(got, expected, "the call did not wait for its stream")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_check_for_waiting_works(gpu: Target) -> None:
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=gpu.device).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_never_waits_for_the_device(case: Case, gpu: Target) -> None:
    inputs = case.make(gpu.device)
    if case.dropout_p:
        inputs = inputs.changed(options={"dropout_seed": None})  # drawn from the device's generator
    inputs.run(gpu.backend)
    torch.cuda.synchronize()
    with no_synchronisation():
        inputs.run(gpu.backend)


def captured(step: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of the step, and the tensors that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def replayed(graph: torch.cuda.CUDAGraph, results: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in results.values():
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return {name: tensor.clone() for name, tensor in results.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_graph_computes_what_a_call_does(case: Case, gpu: Target) -> None:
    """With other values in the same memory, as training and serving replay it."""
    inputs = case.make(gpu.device)
    graph, results = captured(lambda: inputs.run(gpu.backend))
    for seed in (1, 2):
        fresh = case.make(gpu.device, seed=seed)
        for name in ("q", "k", "v", "dout"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        assert_equal(replayed(graph, results), inputs.run(gpu.backend), f"seed {seed}")


def changing(inputs: Inputs, option: str, values: list[list[int]], gpu: Target) -> list[dict[str, Tensor]]:
    """Replays of one graph with each of the values in an option's memory; every one equals a call of its own."""
    graph, results = captured(lambda: inputs.run(gpu.backend))
    found = []
    for value in values:
        inputs.options[option].copy_(torch.tensor(value))
        found.append(replayed(graph, results))
        assert_equal(found[-1], inputs.run(gpu.backend), f"{option} {value}")
    return found


def test_a_graph_takes_another_dropout_mask_from_its_seed(gpu: Target) -> None:
    inputs = Case("dropout", **SHAPE, dropout_p=0.3, causal=True).make(gpu.device)
    first, second, again = changing(inputs, "dropout_seed", [[1, 0], [1, 1], [1, 0]], gpu)
    assert not torch.equal(first["out"], second["out"])
    assert_equal(first, again, "the same seed again")


def test_a_graph_draws_a_fresh_seed_at_every_replay(gpu: Target) -> None:
    inputs = Case("dropout", **SHAPE, dropout_p=0.3).make(gpu.device).changed(options={"dropout_seed": None})
    graph, results = captured(lambda: inputs.run(gpu.backend))
    first, second = replayed(graph, results), replayed(graph, results)
    assert not torch.equal(first["out"], second["out"])


def test_a_graph_takes_other_packed_lengths(gpu: Target) -> None:
    inputs = Case("packed", heads=8, kv_heads=2, lengths_q=LENGTHS, head_dim=64, causal=True, dtype=torch.bfloat16).make(gpu.device)
    inputs.options["cu_seqlens_q"] = inputs.options["cu_seqlens_q"].clone()
    total = sum(LENGTHS)
    changing(inputs, "cu_seqlens_q", [[0, 1, 2, 3, total], [0, 259, 259, 400, total], [0, 0, 0, 0, 100]], gpu)


@pytest.mark.parametrize("rows", [1, 259])
def test_a_graph_takes_other_key_lengths(rows: int, gpu: Target) -> None:
    """Captured while the sequences are short, replayed when they have grown."""
    case = Case("cache", **(SHAPE | {"seqlen_q": rows, "seqlen_k": 4099}), kv_lengths=(1, 5), window=(None, 0))
    changing(case.make(gpu.device), "kv_lengths", [[4099, 300], [2, 4000], [0, 1]], gpu)


def test_a_call_runs_on_the_device_of_its_tensors(gpu: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    other = torch.device("cuda", 1)
    expected, got = (Case("causal", **SHAPE, causal=True).make(device).run(gpu.backend) for device in (gpu.device, other))
    assert {tensor.device for tensor in got.values()} == {other}
    assert_equal({name: tensor.to(gpu.device) for name, tensor in got.items()}, expected, "the other GPU")
