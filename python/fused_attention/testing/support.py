"""What each backend computes, asked of the backends themselves: the README's table.

python -m fused_attention.testing.support
"""

from __future__ import annotations

from typing import Any

import torch

from fused_attention.backend import KERNELS, ORDER, REFERENCE
from fused_attention.problem import Problem
from fused_attention.validation import check

BATCH, HEADS, SEQLEN, HEAD_DIM = 2, 4, 8, 16
HOME = {"triton": (torch.device("cuda", 0), (9, 0)), "cuda": (torch.device("cuda", 0), (9, 0))}  # where a GPU backend would run
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
NARROW = ("cuda",)  # asked about options in bfloat16: that it lacks other types is told once


def features() -> dict[str, Problem]:
    """One problem a feature, each with all its gradients."""
    rectangle = (BATCH, 1, SEQLEN, SEQLEN)
    per_head = torch.ones(HEADS, requires_grad=True)
    options: dict[str, dict[str, Any]] = {
        "causal, window, offset": {"causal": True, "window": (4, None), "offset": 1},
        "kv_lengths": {"kv_lengths": torch.tensor([3, 8])},
        "mask": {"mask": torch.ones(rectangle, dtype=torch.bool)},
        "bias and its gradient": {"bias": torch.zeros(rectangle, requires_grad=True)},
        "ALiBi and its gradient": {"alibi_slopes": per_head},
        "softcap": {"softcap": 30.0},
        "sinks and their gradient": {"sinks": per_head},
        "dropout": {"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
    }
    dtypes = {name: _problem(dtype=dtype) for name, dtype in TYPES.items()}
    shapes = {
        "grouped queries (GQA)": _problem(kv_heads=2),
        "head_dim_v of its own": _problem(head_dim_v=24),
        "any strides": _problem(strided=True),
    }
    return dtypes | shapes | {name: _problem(**given) for name, given in options.items()} | {"packed sequences": _packed()}


def table() -> str:
    """A Markdown table: a feature a row, a backend a column."""
    names = [*KERNELS, REFERENCE]
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + ":-:|" * len(names)]
    for feature, problem in features().items():
        in_its_type = [problem._replace(dtype=torch.bfloat16) if name in NARROW and feature not in TYPES else problem for name in names]
        cells = [_cell(name, asked) for name, asked in zip(names, in_its_type, strict=True)]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, problem: Problem) -> str:
    """yes; or forward alone; or which backend the automatic choice takes on that device instead."""
    if name == REFERENCE or _unsupported(name, problem) is None:
        return "yes"
    if _unsupported(name, problem._replace(gradients=frozenset())) is None:
        return "forward"
    device, _ = HOME.get(name, (problem.device, None))
    return next(f"→ `{other}`" for other in ORDER[device.type] if other != name and _unsupported(other, problem) is None)


def _unsupported(name: str, problem: Problem) -> str | None:
    device, architecture = HOME.get(name, (problem.device, None))
    return KERNELS[name].unsupported(problem._replace(device=device, architecture=architecture))


def _problem(
    *, dtype: torch.dtype = torch.float32, kv_heads: int = HEADS, head_dim_v: int = HEAD_DIM, strided: bool = False, **options: Any
) -> Problem:
    step = 2 if strided else 1
    shapes = ((HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, head_dim_v))
    q, k, v = (torch.ones(BATCH, heads, SEQLEN, dim * step, dtype=dtype)[..., ::step].requires_grad_() for heads, dim in shapes)
    return check(q, k, v, **options)


def _packed() -> Problem:
    q = torch.ones(SEQLEN, HEADS, HEAD_DIM, requires_grad=True)
    return check(q, q, q, cu_seqlens_q=torch.tensor([0, 3, SEQLEN]))


if __name__ == "__main__":
    print(table())
