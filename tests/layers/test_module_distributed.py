"""Modules on several workers: DDP and FSDP2 on two ranks train as one process with the whole batch does; DataParallel on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_attention import Transformer, replace_modules

from .two_ranks import RANKS, batch, model, train

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch was built without gloo")
def test_two_ranks_train_as_one_process_does(tmp_path):
    # A sandboxed machine may not resolve its own name.
    environment = os.environ | {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    command = [sys.executable, str(SCRIPT)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(RANKS)
    ]
    try:
        outcomes = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, outcomes
    expected = pytest.approx(train(model(nn.Transformer)), rel=1e-6)  # Adam divides by the gradient's size, so that rounding grows
    for stdout, _ in outcomes:
        assert json.loads(stdout) == {"DDP": expected, "FSDP2": expected}


def test_data_parallel_without_devices_is_the_module():
    network = model(nn.Transformer)
    expected = network(*batch(0))
    replace_modules(network)
    wrapped = nn.DataParallel(network)
    torch.testing.assert_close(wrapped(*batch(0)), expected)
    torch.testing.assert_close(nn.DataParallel(model(Transformer))(*batch(0)), expected)
    assert list(wrapped.state_dict()) == [f"module.{name}" for name in network.state_dict()]
