"""The tile of every pass, by architecture, head_dim and element size: data, so that nothing is tuned while a user waits.

Chosen by what the compiled code costs: the largest tile that keeps a loop free of spills under Triton 3.6.0 and 3.7.1, causal or
not, within the shared memory of a block. tests/codegen/ledger.json holds the figures.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple


class TileConfig(NamedTuple):
    """Rows of queries and of keys a program works on at a time, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    precision: str = "tf32x3"  # of fp32 products: see matmul.py

    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "PRECISION": self.precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


Sizes = tuple[int, int, int, int]  # block_m, of decode the most rows; block_n, num_warps, num_stages
Table = dict[str, dict[int, Sizes]]  # of a pass, by the largest head_dim a row serves

EVERYWHERE: Table = {"delta": {64: (64, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1), 512: (8, 16, 4, 1)}}  # bound by memory
INTERPRETER: Table = {name: {512: (64, 32, 4, 1)} for name in ("forward", "decode", "dkv", "dk", "dv", "dq", "dbias")}

# Of fp16 and bf16. A head_dim of 192 is held as 128 + 64: with mma.sync its tiles spill where 256, a single chunk, does not.
HALF: dict[str, Table] = {
    "sm_80": {
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2), 512: (32, 32, 8, 1)},
        "decode": {64: (64, 128, 4, 2), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dkv": {96: (32, 128, 8, 2), 128: (64, 64, 8, 2), 192: (32, 32, 8, 2), 256: (16, 64, 8, 2)},
        "dk": {512: (32, 32, 8, 1)},
        "dv": {512: (32, 32, 8, 1)},
        "dbias": {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    },
    "sm_90": {
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3), 512: (32, 32, 8, 1)},
        "decode": {64: (64, 128, 4, 2), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dq": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dkv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "dk": {512: (32, 32, 8, 1)},
        "dv": {512: (16, 64, 8, 1)},
        "dbias": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2), 512: (64, 16, 8, 1)},
    },
    "sm_100": {
        "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3), 512: (64, 16, 8, 2)},
        "decode": {64: (64, 128, 4, 2), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2), 512: (32, 16, 8, 1)},
        "dkv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},  # 64-key tiles at 256 want 544 of 512 tensor memory columns
        "dk": {512: (32, 32, 8, 1)},
        "dv": {512: (32, 32, 8, 1)},
        "dbias": {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    },
    "sm_120": {
        "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 192: (64, 16, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
        "decode": {64: (64, 128, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1), 512: (32, 16, 8, 1)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 192: (64, 16, 8, 2), 256: (64, 32, 8, 1), 512: (32, 16, 8, 1)},
        "dkv": {96: (32, 128, 8, 2), 128: (64, 64, 8, 2), 192: (32, 32, 8, 2), 256: (16, 64, 8, 2)},
        "dk": {512: (16, 16, 8, 1)},
        "dv": {512: (32, 32, 8, 1)},
        "dbias": {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    },
    "gfx942": {
        "forward": {64: (128, 64, 4, 2), 128: (128, 64, 4, 2), 256: (128, 64, 4, 1), 512: (64, 32, 4, 1)},
        "decode": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 1), 512: (32, 16, 4, 1)},
        "dq": {64: (128, 64, 4, 2), 128: (128, 64, 4, 2), 256: (128, 32, 4, 1), 512: (32, 16, 4, 1)},
        "dkv": {64: (64, 64, 4, 2), 128: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        "dk": {512: (16, 32, 4, 1)},
        "dv": {512: (32, 32, 4, 1)},
        "dbias": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 32, 4, 1), 512: (16, 16, 4, 1)},
    },
}

# Of fp32: three products for one, and twice the shared memory.
_FULL: Table = {
    "forward": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    "decode": {64: (64, 32, 4, 1), 128: (32, 16, 4, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    "dq": {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1), 512: (8, 16, 8, 1)},
    "dkv": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 32, 8, 1)},
    "dk": {512: (16, 8, 8, 1)},
    "dv": {512: (16, 16, 8, 1)},
    "dbias": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1), 512: (16, 8, 8, 1)},
}
FULL: dict[str, Table] = {
    "sm_80": _FULL,
    "sm_90": _FULL | {
        "forward": _FULL["forward"] | {128: (128, 32, 8, 2)},  # 24 spills in the loop; the largest tile without is 16x16
        "dq": _FULL["dq"] | {64: (128, 64, 8, 3)},
        "dkv": _FULL["dkv"] | {64: (32, 64, 8, 2)},
    },
    "sm_100": _FULL | {"dq": _FULL["dq"] | {64: (64, 32, 8, 2)}},
    "sm_120": _FULL,
    "gfx942": {
        "forward": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
        "decode": {64: (64, 32, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)},
        "dq": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1), 512: (16, 16, 4, 1)},
        "dkv": {64: (32, 64, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
        "dk": {512: (16, 16, 4, 1)},
        "dv": {512: (16, 16, 4, 1)},
        "dbias": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1), 512: (16, 16, 4, 1)},
    },
}  # fmt: skip

WIDEST_TF32X3 = 128  # head_dim: at 256 and 16x16 its parts spill 13 to 218 times a loop; plain fp32 arithmetic never

# The most stages of a pass that also loads a number for every pair, which takes up to 4 bytes and is staged too. With the table's own,
# forward of bf16 at head_dim 128 wants 196608 bytes of the 166912 on sm_80, 131072 of the 101376 on sm_120. Of fp32 it is 1: dq at 64
# wants 360448 of the 232448 on sm_90.
PAIR_STAGES = {"sm_80": 2, "sm_90": 3, "sm_100": 3, "sm_120": 1, "gfx942": 1, "interpreter": 1}
SINGLE_STAGE = {("sm_100", "dq", 256)}  # two, of bf16 with every option, want 233544 of the 232448 bytes

# Whose tiles fit an architecture without its own: as much shared memory, and the same tensor cores or a later kind of them.
ALIKE = {
    "sm_86": "sm_120",
    "sm_87": "sm_80",
    "sm_88": "sm_80",
    "sm_89": "sm_120",
    "sm_101": "sm_100",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
}
SMALLEST = {"sm": "sm_120", "gfx": "gfx942"}


@functools.cache
def choose(architecture: str, name: str, head_dim: int, itemsize: int, precision: str, by_pair: bool = False) -> TileConfig:
    """The tile of a pass; head_dim is the larger of q's and v's; by_pair: a mask, a bias or dropout has a number for every pair."""
    rows = table(architecture, itemsize).get(name) or EVERYWHERE[name]
    widest = min(widest for widest in rows if widest >= head_dim)
    block_m, block_n, num_warps, num_stages = rows[widest]
    if by_pair:
        single = itemsize != 2 or (family(architecture), name, widest) in SINGLE_STAGE
        num_stages = 1 if single else min(num_stages, PAIR_STAGES[family(architecture)])
    if architecture.startswith("gfx") or (precision == "tf32x3" and itemsize == 4 and head_dim > WIDEST_TF32X3):
        precision = "ieee"  # on AMD GPUs fp32 products can be nothing else, and a name they do not know fails for every dtype
    return TileConfig(block_m, block_n, num_warps, num_stages, precision)


def splits_key_value(architecture: str, head_dim: int, itemsize: int) -> bool:
    """Whether dk and dv are passes of their own, "dk" and "dv": both at once would not fit a program of a sensible size."""
    return head_dim > max(table(architecture, itemsize)["dkv"])


def table(architecture: str, itemsize: int) -> Table:
    name = family(architecture)
    return INTERPRETER if name == "interpreter" else HALF[name] if itemsize == 2 else FULL[name]


def family(architecture: str) -> str:
    """The name under which the tables hold an architecture."""
    if architecture in PAIR_STAGES:
        return architecture
    return ALIKE.get(architecture) or SMALLEST["gfx" if architecture.startswith("gfx") else "sm"]
