"""The gradients of the kernels against finite differences of their own forward, in float64, lse included.

No oracle is asked: what backward computes is the derivative of what forward computes, option by option and all together.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention import attention_varlen_with_lse, attention_with_lse
from fused_attention.testing import Case, Inputs

TINY = {"batch": 2, "heads": 2, "seqlen_q": 2, "seqlen_k": 5, "head_dim": 3, "dtype": torch.float64}
MEMBERS = {"lengths_q": (2, 0, 3), "lengths_k": (3, 1, 4), "heads": 2, "head_dim": 3, "dtype": torch.float64}
ALL = {"window": (4, None), "offset": 2, "alibi_slopes": "bh", "softcap": 1.5, "sinks": True, "dropout_p": 0.3, "scale": 0.6}
DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")

CASES = (
    Case("plain", **TINY),
    Case("causal-gqa", **(TINY | {"heads": 4, "kv_heads": 2}), causal=True),
    Case("window-offset", **TINY, window=(2, 1), offset=1),
    Case("mask", **TINY, mask="bhqk", sinks=True),
    *(Case(f"bias-{pattern}", **TINY, bias=pattern, mask="11qk") for pattern in ("qk", "1111", "1hq1", "bh1k", "1hqk", "b1qk")),
    Case("alibi", **TINY, alibi_slopes="h"),
    Case("alibi-members", **TINY, alibi_slopes="bh", offset=(1, -2)),
    Case("softcap", **TINY, softcap=0.8),
    Case("sinks", **TINY, sinks=True, kv_lengths=((1, 4), (3, 3))),
    Case("dropout", **TINY, dropout_p=0.4),
    Case("head-dims", **(TINY | {"head_dim": 2, "batch": 1}), head_dim_v=4),
    Case("packed", **MEMBERS, sinks=True),
    Case("packed-everything", **MEMBERS, causal=True, kv_lengths=(3, 0, 4), **(ALL | {"window": (2, None)})),
    Case("everything", **(TINY | {"heads": 2, "kv_heads": 1}), causal=True, mask="b1qk", bias="1hqk", kv_lengths=((0, 5), (1, 4)), **ALL),
)  # fmt: skip


def differentiated(inputs: Inputs, fast_mode: bool) -> bool:
    """Whether autograd and finite differences of out and lse agree, for every input that has a gradient."""
    function = attention_varlen_with_lse if inputs.packed else attention_with_lse
    names = [name for name in DIFFERENTIABLE if name in inputs.options]
    leaves = [tensor.clone().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v, *(inputs.options[name] for name in names))]
    seen = inputs.truth(backward=False).lse > -torch.inf

    def results(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = function(q, k, v, **(inputs.options | dict(zip(names, others, strict=True))), backend="triton")
        return out, lse[seen]  # the derivative of a constant -inf has no finite differences

    return torch.autograd.gradcheck(results, leaves, fast_mode=fast_mode, check_undefined_grad=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_the_derivative_of_the_forward(case):
    """In random directions, which every element has a part in."""
    assert differentiated(case.make(), fast_mode=True)


def test_every_element_of_every_gradient():
    case = Case("elements", **(TINY | {"batch": 1, "kv_heads": 1, "seqlen_k": 3, "head_dim": 2}), bias="1hqk", **ALL)
    assert differentiated(case.make(), fast_mode=False)
