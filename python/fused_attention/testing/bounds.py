"""Is a result right?  Every tensor against its elementwise bound (tier 1), and the errors of its rows as a whole (tier 2).

    used = max |got - truth| / bound            a correct kernel never passes 1
    rho_i = |error of row i| / |out of row i|   about 0.43 u where only the result is rounded to its type, 0.60 u where the weights are too

Tier 0, exact inputs whose result has no rounding at all, needs no bound: torch.equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Truth
from .tier1 import UNIT_ROUNDOFF, tier1

SLACK = 1.01  # for products of two errors


class TensorReport(NamedTuple):
    """One tensor against its truth."""

    name: str
    used: float  # largest |got - expected| / bound
    place: tuple[int, ...]  # where that is
    got: float
    expected: float
    bound: float

    def __str__(self) -> str:
        if not self.place:
            return f"{self.name} is empty"
        share = f"{self.used:.1%} of its bound" if self.used < 10 else f"{self.used:.3g} times its bound"
        place = ", ".join(map(str, self.place))
        return f"{self.name} uses {share}, most at [{place}]: got {self.got:.9g}, expected {self.expected:.9g} +- {self.bound:.3g}"


@dataclass(frozen=True)
class Report:
    """Every tensor of a call against its truth; `used` is the largest share of a bound, above 1 a failure."""

    tensors: tuple[TensorReport, ...]

    @property
    def used(self) -> float:
        return max((tensor.used for tensor in self.tensors), default=0.0)

    @property
    def failures(self) -> tuple[TensorReport, ...]:
        return tuple(tensor for tensor in self.tensors if not tensor.used <= 1.0)

    def __str__(self) -> str:
        return "\n".join(map(str, self.tensors))


def measure(output: Tensor | Mapping[str, Tensor | None], truth: Truth) -> Report:
    """Compares `out` alone, or any of {out, lse, dq, dk, dv, dbias, dalibi_slopes, dsinks}, with the truth.

    Raises AssertionError where a tensor is missing, has another shape or dtype, or is not among the truth's values.
    """
    named = {"out": output} if isinstance(output, Tensor) else dict(output)
    bounds = tier1(truth)
    reports = []
    for name, tensor in named.items():
        if name not in truth.values:
            raise AssertionError(f"the truth has no {name}, only {', '.join(truth.values)}: give the oracle dout and the option itself")
        expected, dtype = truth.values[name], truth.dtypes[name]
        if tensor is None:
            raise AssertionError(f"{name} is None, expected a tensor of shape {tuple(expected.shape)}")
        if tensor.shape != expected.shape or tensor.dtype != dtype:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise AssertionError(f"{name} is {got}, expected {dtype} of shape {tuple(expected.shape)}")
        reports.append(_compare(name, tensor.detach().to(expected.device, torch.float64), expected, bounds[name]))
    return Report(tuple(reports))


def check(output: Tensor | Mapping[str, Tensor | None], truth: Truth) -> Report:
    """`measure`, and an AssertionError with one sentence for each tensor that leaves its bound."""
    report = measure(output, truth)
    if report.failures:
        raise AssertionError("\n".join(map(str, report.failures)))
    return report


def _compare(name: str, got: Tensor, expected: Tensor, bound: Tensor) -> TensorReport:
    if not got.numel():
        return TensorReport(name, 0.0, (), 0.0, 0.0, 0.0)
    error = torch.where(got == expected, 0.0, (got - expected).abs())  # -inf - -inf would be nan
    used = torch.where(error == 0.0, 0.0, error / (SLACK * bound)).nan_to_num(nan=math.inf, posinf=math.inf)
    place = tuple(int(i) for i in torch.unravel_index(used.argmax(), got.shape))
    return TensorReport(name, float(used[place]), place, float(got[place]), float(expected[place]), float(bound[place]))


class RowStatistics(NamedTuple):
    """Errors of a result's rows, in units of the roundoff of its type."""

    median: float
    high: float  # 99.9th percentile
    largest: float
    bias: float  # mean signed error in standard deviations of a mean without bias

    def __str__(self) -> str:
        return f"rho median {self.median:.2f} u, p99.9 {self.high:.2f} u, largest {self.largest:.2f} u, bias {self.bias:.1f} sigma"


def row_statistics(out: Tensor, truth: Truth) -> RowStatistics:
    """Norms of the rows' errors beside the norms of the rows, and whether the errors lean to one side.

    For random inputs of 16-bit types.  The median has a lower limit too: an error far below 0.35 u means that another type was used.
    """
    error = (out.detach().double() - truth.out).reshape(-1, out.shape[-1])
    expected = truth.out.reshape(-1, out.shape[-1])
    seen = expected.norm(dim=1) > 0.0
    error, expected = error[seen], expected[seen]
    rho = error.norm(dim=1) / expected.norm(dim=1) / UNIT_ROUNDOFF[out.dtype]
    # Away from zero or towards it: truncation shows as a mean of error * sign(expected).
    leaning = (error * expected.sign()) / expected.abs().clamp_min(1e-300)
    bias = float(leaning.mean() / leaning.std() * math.sqrt(leaning.numel()))
    return RowStatistics(float(rho.median()), float(torch.quantile(rho, 0.999)), float(rho.max()), bias)
