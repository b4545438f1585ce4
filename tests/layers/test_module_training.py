"""Training as it is done at scale: gradient accumulation, activation checkpointing, DDP and FSDP2 of swapped and of our own models."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_attention import MultiHeadAttention, Transformer, TransformerLayer, replace_modules, restore_modules

D_MODEL, HEADS, BATCH, SEQLEN = 8, 2, 4, 5


def model(cls=Transformer, **options):
    torch.manual_seed(0)
    return cls(D_MODEL, HEADS, 1, 1, 16, batch_first=True, **{"dropout": 0.0, "dtype": torch.float64, **options})


def batch(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, SEQLEN, D_MODEL, generator=draw, dtype=torch.float64) for _ in range(2)]


def later():
    return torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)


def train(network, steps=3, parts=1, run=None):
    """Losses of some AdamW steps, each on a batch taken in equal parts."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for src, tgt in zip(*(tensor.chunk(parts) for tensor in batch(step)), strict=True):
            loss = (run or network)(src, tgt, tgt_mask=later()).square().mean() / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def test_accumulated_gradients_are_those_of_the_whole_batch():
    # Adam divides by the gradient's size, so that rounding grows: a part in a million, of a loss of order one.
    assert train(model(), parts=4) == pytest.approx(train(model()), rel=1e-6)
    assert train(model(), parts=2) == pytest.approx(train(model(nn.Transformer), parts=2), rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_layers_recompute_the_same(dropout):
    """Each layer checkpointed, as training scripts do: the dropout of the second forward is that of the first."""
    gradients = []
    for wrapped in (False, True):
        network = model(dropout=dropout)
        if wrapped:
            for layer in (*network.encoder.layers, *network.decoder.layers):
                layer.forward = lambda *args, forward=layer.forward, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
        torch.manual_seed(7)
        out = network(*batch(), tgt_mask=later())
        gradients.append([out, *torch.autograd.grad(out.square().sum(), network.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch was built without gloo")
    previous = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a sandboxed machine may not resolve its own name
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        if previous is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = previous


@pytest.mark.parametrize("swapped", [False, True])
def test_distributed_data_parallel(alone, swapped):
    network = model(nn.Transformer if swapped else Transformer)
    replace_modules(network)
    wrapped = DistributedDataParallel(network)
    assert train(network, run=wrapped) == pytest.approx(train(model(nn.Transformer)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of nn.Linear, whose output is a view if its input has strides
def test_fully_sharded_data_parallel(alone):
    network = model()
    for layer in (*network.encoder.layers, *network.decoder.layers):
        fully_shard(layer.self_attn.out_proj)  # called as a module, so it can be a unit of its own
        fully_shard(layer)
    fully_shard(network)
    assert train(network) == pytest.approx(train(model(nn.Transformer)), rel=1e-6)
    state = {name: value.full_tensor() for name, value in network.state_dict().items()}
    model(nn.Transformer).load_state_dict(state, strict=True)


def test_swaps_come_before_sharding(alone):
    network = model(nn.Transformer)
    fully_shard(network.encoder.layers[0])
    report = replace_modules(network)
    assert "before parametrising, sharding" in report.skipped["encoder.layers.0"]
    assert type(network.decoder.layers[0].self_attn) is MultiHeadAttention
    swapped = model(nn.Transformer)
    replace_modules(swapped)
    fully_shard(swapped.encoder.layers[0])
    assert isinstance(swapped.encoder.layers[0], TransformerLayer)
    assert "encoder.layers.0" in restore_modules(swapped).skipped


def test_a_state_dict_of_training_moves_to_torchs_model_and_back():
    """Mid-run: optimizer and weights continue in torch's classes, and in ours again."""
    whole, network = train(model(), steps=6), model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        if step in (2, 4):
            other = model(nn.Transformer if step == 2 else Transformer)
            other.load_state_dict(network.state_dict(), strict=True)
            resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            network, optimizer = other, resumed
        src, tgt = batch(step)
        loss = network(src, tgt, tgt_mask=later()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(whole, rel=1e-6)


def test_training_with_dropout_ends_where_torchs_does_within_the_noise_of_the_seed():
    """Dropout draws other elements than torch's: single runs differ, their mean over seeds lies inside the spread of torch's."""

    def final_losses(cls):
        ends = []
        for seed in range(6):
            network = model(cls, dropout=0.2)
            torch.manual_seed(seed)
            ends.append(train(network, steps=12)[-1])
        return ends

    theirs, ours = final_losses(nn.Transformer), final_losses(Transformer)
    assert min(theirs) < sum(ours) / len(ours) < max(theirs)
    assert min(ours) < sum(theirs) / len(theirs) < max(ours)
    assert theirs != ours
