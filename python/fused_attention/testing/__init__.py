"""Proof for anyone with an attention kernel: the float64 truth, the bounds of a correct result, and problems to try.

inputs = Case("mine", causal=True, heads=6, kv_heads=2).make()
check({"out": kernel(inputs.q, inputs.k, inputs.v)}, inputs.truth())
"""

from .bounds import Report, RowStatistics, TensorReport, check, measure, row_statistics
from .cases import CASES
from .inputs import Case, Inputs
from .oracle import Truth, oracle
from .tier1 import Arithmetic, tier1

__all__ = [
    "CASES",
    "Arithmetic",
    "Case",
    "Inputs",
    "Report",
    "RowStatistics",
    "TensorReport",
    "Truth",
    "check",
    "measure",
    "oracle",
    "row_statistics",
    "tier1",
]
