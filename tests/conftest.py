"""What every test shares: one thread, for the problems are tiny and OpenMP's waiting threads would slow a shared machine down tenfold."""

import torch

torch.set_num_threads(1)
