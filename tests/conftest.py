"""What every test shares: one thread, and under TRITON_INTERPRET=1 an interpreter that can be trusted and tiles that fit small problems."""

import os

import torch

# The problems are tiny, and OpenMP's waiting threads would slow a shared machine down tenfold.
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    from fused_attention.triton_kernels import decode, tiles

    from .triton import interpreter, interpreter_speed

    np.seterr(all="ignore")  # the interpreter computes with numpy, and a GPU gives no warning of infinities
    interpreter.apply()
    interpreter_speed.apply()
    # Several tiles and several splits, with remainders, in problems that an interpreter can do.
    tiles.choose = lambda *_: tiles.TileConfig(16, 16)
    decode.SPLIT = 32
