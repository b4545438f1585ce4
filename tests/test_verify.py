"""fused-attention verify's devices: all that this machine has, each with the backends that take its tensors, and none that is not here."""

import argparse

import pytest
import torch

from fused_attention import backends
from fused_attention.testing import Case, verify


def verified(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args([*arguments, "--cases", "causal+scale"]))


def lines_of(printed: str, backend: str) -> int:
    return sum(backend in line.split() for line in printed.splitlines())


@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")])
def test_the_cpu_is_always_checked(arguments, capsys):
    assert verified(*arguments) == 0
    printed = capsys.readouterr().out
    devices = 2 if torch.cuda.is_available() and not arguments else 1
    assert lines_of(printed, "torch") == lines_of(printed, "reference") == devices
    assert "cpu" in printed


def test_a_gpu_is_checked_too(capsys, monkeypatch):
    """Where torch has one; its tensors are the CPU's here, so that a machine without can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made, original = [], Case.make
    monkeypatch.setattr(Case, "make", lambda case, device, seed: (made.append(str(device)), original(case, seed=seed))[1])
    assert verified() == 0
    assert made == ["cpu", "cuda"]
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row[:1] == ["cuda"] and row[1] in backends()] == [["cuda", "torch"], ["cuda", "reference"]]


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "'cuda:99' is not here"), ("quantum", "'quantum' is no device of torch's"), ("meta", "'meta' is not checked")],
)
def test_other_devices_are_refused(device, message, capsys):
    with pytest.raises(SystemExit):
        verified("--device", device)
    assert message in capsys.readouterr().err


def test_a_demanded_backend_that_takes_no_tensors_of_the_device_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(verify, "backends", lambda: dict.fromkeys(backends()))
    assert verified("--device", "cuda", "--backend", "cpu") == 1
    assert "cpu is off: it computes nothing on cuda" in capsys.readouterr().out
