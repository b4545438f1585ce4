"""Every backend on every case: equal to the oracle, forward and all gradients, or refused with its sentence; no option is ever ignored."""

from __future__ import annotations

import argparse
import re
from functools import cache

import pytest
import torch

from fused_attention import backends, blockwise, explain
from fused_attention.testing import CASES, Case, Inputs, Truth, check, tier1, verify

RUNNABLE = [name for name, reason in backends().items() if reason is None]
NEVER_MATTERS = {
    ("nothing", "causal"),  # there is nothing to hide
    ("window-huge", "window"),  # it must not overflow
    ("packed-none", "cu_seqlens_k"),  # there is no query
}
# Without a gradient of lse the Triton kernels differ in one subtraction, and the interpreter is slow.
ALONE = [case for case in CASES if "+" not in case.name][:: 3 if "triton" in RUNNABLE else 1]


@cache
def problem(case: Case) -> tuple[Inputs, Truth]:
    inputs = case.make()
    return inputs, inputs.truth()


@pytest.fixture
def many_tiles(monkeypatch):
    """Tiles small enough that these problems have several, with remainders on both sides."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_backend_equals_the_oracle_or_says_why_not(case, backend, many_tiles):
    inputs, truth = problem(case)
    if backend not in RUNNABLE:
        with pytest.raises(NotImplementedError, match=re.escape(str(backends()[backend]))):
            inputs.run(backend)
        pytest.skip(f"{backend}: {backends()[backend]}")
    try:
        output = inputs.run(backend)
    except NotImplementedError as refusal:
        reason = inputs.explain().reasons[backend]
        if reason is None or reason not in str(refusal):
            raise
        return
    check(output, truth)
    if backend != "reference":  # which lies as its matrix products leave it
        assert output["out"].stride() == expected_strides(inputs), "out is not laid out as torch.empty_like(q)"
        assert output["lse"].is_contiguous()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_gradients_of_out_alone(case, backend, many_tiles):
    """Most losses never touch lse, and a backend may then run another kernel."""
    inputs = problem(case)[0].changed(dlse=None)
    if inputs.explain().reasons[backend] is not None:
        pytest.skip(f"{backend}: {inputs.explain().reasons[backend]}")
    check(inputs.run(backend), inputs.truth())


def expected_strides(inputs: Inputs) -> tuple[int, ...]:
    """The strides of torch.empty_like(q), were its rows as long as those of v."""
    q, width = inputs.q, inputs.v.shape[-1]
    if width == q.shape[-1]:
        return torch.empty_like(q).stride()
    order = sorted(range(q.dim()), key=lambda dim: torch.empty_like(q).stride()[dim], reverse=True)
    shape = (*q.shape[:-1], width)
    return torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(q.dim())]).stride()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("name", ["long-causal", "long-window", "everything", "packed-everything"])
def test_inference_computes_the_same_numbers(name, backend):
    """Without gradients a backend may save less, but must compute the same."""
    inputs, _ = problem(next(case for case in CASES if case.name == name))
    if inputs.explain().reasons[backend] is not None:
        pytest.skip(f"{backend}: {inputs.explain().reasons[backend]}")
    trained = inputs.run(backend)
    with torch.inference_mode():
        inferred = inputs.run(backend, backward=False)
    for tensor in ("out", "lse"):
        assert torch.equal(trained[tensor], inferred[tensor])


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "triton"])  # whose tiles in tests are of 16
def test_a_problem_longer_than_the_tiles_of_every_backend(backend):
    inputs = Case("longer", batch=1, heads=2, kv_heads=1, seqlen_q=577, seqlen_k=1031, head_dim=16, window=(600, 7)).make()
    check(inputs.run(backend), inputs.truth())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_option_of_a_case_changes_its_result(case):
    """A backend that ignored an option could not pass the matrix."""
    inputs, truth = problem(case)
    bounds = tier1(truth)
    for option in inputs.options.keys() - {"cu_seqlens_q", "dropout_seed"}:
        if (case.name, option) in NEVER_MATTERS:
            continue
        without = inputs.changed(options={option: None}).truth()
        moved = [
            (torch.where(value == truth.values[name], 0.0, (value - truth.values[name]).abs()) > 10 * bounds[name]).any()
            for name, value in without.values.items()
        ]
        assert any(moved), f"{option} does not matter"


def verified(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args(arguments))


def test_verify_prints_a_line_for_every_backend(capsys):
    assert verified("--cases", "packed") == 0
    printed = capsys.readouterr().out
    for name, reason in backends().items():
        assert (f"{name} is off: {reason}" in printed) if reason else (name in printed)
    count = sum("packed" in case.name for case in CASES)
    assert f"{count} cases, forward and all gradients, against float64: " in printed
    assert "0 failed" in printed


def test_verify_fails_where_a_backend_is_wrong(capsys, monkeypatch):
    original = blockwise.forward
    monkeypatch.setattr(blockwise, "forward", lambda q, k, v, problem: original(q, k, v, problem._replace(scale=1.0)))
    assert verified("--backend", "torch", "--cases", "causal+scale") == 1
    assert "torch, causal+scale: out uses" in capsys.readouterr().out


def test_verify_fails_where_the_demanded_backend_is_off(capsys):
    assert verified("--backend", "cuda", "--cases", "base") == 1
    assert f"cuda is off: {backends()['cuda']}" in capsys.readouterr().out


def test_the_automatic_choice_equals_the_backend_it_names():
    for case in CASES[:40]:
        inputs, _ = problem(case)
        named = inputs.run(inputs.explain().backend)
        for name, tensor in inputs.run().items():
            assert torch.equal(tensor, named[name]), (case.name, name)


def test_an_unknown_backend_is_refused():
    inputs, _ = problem(CASES[0])
    with pytest.raises(ValueError, match=r"backend is 'quantum', expected one of .*'torch'.*'reference'"):
        explain(inputs.q, inputs.k, inputs.v, backend="quantum")
