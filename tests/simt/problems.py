"""Problems of several tiles for the simulated GPU, and what a correct kernel makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import attention_varlen_with_lse, attention_with_lse
from fused_attention.testing import CASES, Case, Inputs, check

# With remainders, full tiles, and tiles that no row sees, for each width of a tile, with options and without.
LONG = (
    Case("long-40", batch=1, heads=2, kv_heads=1, seqlen_q=150, seqlen_k=201, head_dim=40, causal=True),
    Case("long-64-all", batch=1, heads=1, seqlen_q=129, seqlen_k=192, head_dim=64),
    Case("long-96", batch=1, heads=2, kv_heads=1, seqlen_q=140, seqlen_k=99, head_dim=96, causal=True),
    Case("long-128-window", batch=1, heads=1, seqlen_q=131, seqlen_k=161, head_dim=128, window=(40, 3)),
    Case("long-256", batch=1, heads=1, seqlen_q=67, seqlen_k=75, head_dim=256, causal=True),
    Case("long-200-64", batch=1, heads=1, seqlen_q=65, seqlen_k=50, head_dim=200, head_dim_v=64, kv_lengths=((3, 47),)),
    Case("long-33-everything", batch=1, heads=2, kv_heads=1, seqlen_q=70, seqlen_k=139, head_dim=33, head_dim_v=65, causal=True,
         window=(70, None), mask="1hqk", bias="b1qk", hiding_bias=True, alibi_slopes="h", softcap=3.0, sinks=True, dropout_p=0.25),
    Case("long-130-dropout", batch=1, heads=1, seqlen_q=66, seqlen_k=70, head_dim=130, dropout_p=0.4, sinks=True),
    Case("long-packed", lengths_q=(70, 0, 131, 1), lengths_k=(75, 3, 130, 64), heads=2, kv_heads=1, head_dim=64, causal=True),
    Case("long-groups", batch=2, heads=6, kv_heads=3, seqlen_q=3, seqlen_k=65, head_dim=16),
)  # fmt: skip
SHARED = tuple(case for case in CASES if case.dtype is torch.float32)
ALONE = tuple(case for case in SHARED if "+" not in case.name)
SHORT = (torch.arange(40) < 35)[None, None, None]
FEW = ALONE[::3]
DTYPES = (torch.bfloat16, torch.float16)


def call(inputs: Inputs) -> dict[str, Tensor]:
    """out, lse, and the gradients of q, k and v."""
    function = attention_varlen_with_lse if inputs.packed else attention_with_lse
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = function(q, k, v, **inputs.options, backend="cuda")
    roots = [(x, dx) for x, dx in ((out, inputs.dout), (lse, inputs.dlse)) if dx is not None]
    outputs, cotangents = zip(*roots, strict=True)
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), cotangents)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def run(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of a case, within their bounds."""
    inputs = case.make(dtype=dtype)
    output = call(inputs)
    try:
        check(output, inputs.truth())
    except AssertionError as error:
        raise AssertionError(f"{case.name} in {dtype}: {error}") from error
    return output


def run_with_broken_values(value: float, **options: Any) -> None:
    """A value that is not finite reaches exactly the rows that see it, and no finite key of theirs; alone, and with its key."""
    inputs = replace(LONG[0], **options).make(dtype=torch.bfloat16)
    key, offset = 90, inputs.k.shape[2] - inputs.q.shape[2]
    first = key - offset  # the first query that sees it
    clean = call(inputs)
    v, k = inputs.v.clone(), inputs.k.clone()
    v[:, :, key, 5] = value
    k[:, :, key] = value
    for changed in (inputs.changed(v=v), inputs.changed(v=v, k=k)):
        output = call(changed)
        for name in ("out", "lse", "dq"):
            if not torch.equal(output[name][:, :, :first], clean[name][:, :, :first]):
                raise AssertionError(f"{name} of rows that do not see {value} is not what it is without it")
        if output["out"][:, :, first:, 5].isfinite().any():
            raise AssertionError(f"rows that see {value} are finite")


def run_with_a_broken_key_in_a_window() -> None:
    """The rows that see a key of nan are nan, and keys that none of them sees have the gradients of the others."""
    inputs = Case("window", batch=1, heads=1, seqlen_q=64, seqlen_k=64, head_dim=64, causal=True, window=(4, None)).make(
        dtype=torch.bfloat16
    )
    k = inputs.k.clone()
    k[:, :, 10] = math.nan  # seen by rows 10 to 14, which see keys 6 to 14
    output = call(inputs.changed(k=k))
    for name, first, last in (("out", 10, 15), ("dq", 10, 15), ("dk", 6, 15), ("dv", 6, 15)):
        broken = output[name].isnan().any(dim=-1)[0, 0].nonzero()[:, 0].tolist()
        if broken != list(range(first, last)):
            raise AssertionError(f"{name} has nan in rows {broken}, expected {first} to {last - 1}")


def run_with_broken_keys_that_nobody_sees(**options: Any) -> None:
    """Hidden keys of nan, beside queries that do not fill their tile, change nothing."""
    inputs = Case("hidden", batch=1, heads=1, seqlen_q=40, seqlen_k=40, head_dim=64).make(dtype=torch.bfloat16).changed(options=options)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, :, 35:], v[:, :, 35:] = math.nan, math.nan
    clean = call(inputs)
    for name, tensor in call(inputs.changed(k=k, v=v)).items():
        if not torch.equal(tensor, clean[name]):
            raise AssertionError(f"{name} is not what it is with other values in hidden keys")


def run_with_equal_scores() -> None:
    """With all scores alike lse is that score + log(keys), however many tiles they fill: rescaling by 1 rounds nothing."""
    lses = {}
    for keys in (64, 2048):
        q, k = torch.full((1, 1, 16, 64), 5.5, dtype=torch.bfloat16), torch.full((1, 1, keys, 64), 7.25, dtype=torch.bfloat16)
        lses[keys] = attention_with_lse(q, k, torch.ones_like(k), scale=0.11, backend="cuda").lse
    error = (lses[2048] - lses[64] - math.log(2048 / 64)).abs().max().item()
    if error > 4 * 2.0**-24 * lses[2048].max().item():
        raise AssertionError(f"lse is off by {error} after 32 tiles of equal scores")


def run_everything_once() -> None:
    """What a fault in the kernels has to fail, in one type."""
    for case in LONG:
        run(case, torch.bfloat16)
    run_with_broken_values(math.nan)
    run_with_broken_values(math.inf, softcap=3.0)
    run_with_a_broken_key_in_a_window()
    run_with_equal_scores()
    run_with_broken_keys_that_nobody_sees(causal=True, offset=-5)
    run_with_broken_keys_that_nobody_sees(mask=SHORT)
    for case in ALONE:
        run(case, torch.bfloat16)
