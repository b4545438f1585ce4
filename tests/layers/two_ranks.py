"""One rank of two: trains a small Transformer on its half of every batch, under DDP and under FSDP2, and prints the whole batch's losses.

python tests/layers/two_ranks.py RANK FILE_TO_MEET_AT
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_attention import Transformer

D_MODEL, HEADS, BATCH, SEQLEN, STEPS, RANKS = 8, 2, 4, 5, 3, 2


def model(cls):
    torch.manual_seed(0)
    return cls(D_MODEL, HEADS, 1, 1, 16, batch_first=True, dropout=0.0, dtype=torch.float64)


def batch(step):
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(BATCH, SEQLEN, D_MODEL, generator=draw, dtype=torch.float64) for _ in range(2)]


def sharded(network):
    for layer in (*network.encoder.layers, *network.decoder.layers):
        fully_shard(layer.self_attn.out_proj)  # called as a module, so it can be a unit of its own
        fully_shard(layer)
    return fully_shard(network)


def train(network, mine=slice(None)):
    """The mean loss of each step over all ranks; the gradients are averaged by whatever wraps the network."""
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=1e-2), []
    for step in range(STEPS):
        src, tgt = (tensor[mine] for tensor in batch(step))
        optimizer.zero_grad()
        loss = network(src, tgt, tgt_mask=torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= RANKS
        losses.append(total.item())
    return losses


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=RANKS)
    mine = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    losses = {"DDP": train(DistributedDataParallel(model(Transformer)), mine), "FSDP2": train(sharded(model(Transformer)), mine)}
    dist.destroy_process_group()
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
