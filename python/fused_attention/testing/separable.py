"""A truth in linear time, for rows too long for any table of scores: problems whose scores are a term of the query plus a term of the key.

    q_i = (1, a_i, 0, ...),  k_j = (b_j, 1, 0, ...)   ->   scores_ij = scale (a_i + b_j)
    weights_ij = w_j / sum of visible w,   w = exp(scale b)

A row sees an interval of keys, so every output, gradient and bound is a difference of two prefix sums. The kernel knows none of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Report, _compare
from .tier1 import SMALLEST, UNIT_ROUNDOFF, Arithmetic

STEPS = 128  # a and b are multiples of their largest value over this: 8 bits, so that every dtype holds them and scores have no rounding
KEY_RANGE = 4.0  # of b: prefix sums in float64 lose nothing while weights are within exp(scale * 4) of each other
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Intervals(NamedTuple):
    """Half-open intervals of indices into the other sequence, one for each position."""

    low: Tensor
    high: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """The sums over the intervals of values (batch, heads, seqlen, dim)."""
        # Along the last dimension, where CUDA scans in parallel; elsewhere a thread adds up a column alone.
        prefix = F.pad(values.mT.contiguous().cumsum(-1), (1, 0))
        return (prefix[..., self.high] - prefix[..., self.low]).mT

    @property
    def lengths(self) -> Tensor:
        return (self.high - self.low).double()


@dataclass(frozen=True)
class Separable:
    """A problem with its tensors; the options are `causal`, `window` and `offset`, by their names in `attention`."""

    q: Tensor  # (batch, heads, seqlen_q, head_dim)
    k: Tensor  # (batch, heads, seqlen_k, head_dim)
    v: Tensor
    dout: Tensor
    dlse: Tensor
    options: dict[str, Any]

    @property
    def a(self) -> Tensor:
        return self.q[..., 1].double()

    @property
    def b(self) -> Tensor:
        return self.k[..., 0].double()

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def intervals(self) -> tuple[Intervals, Intervals]:
        """The keys that each query sees, and the queries that see each key."""
        seqlen_q, seqlen_k = self.q.shape[2], self.k.shape[2]
        left, right = self.options.get("window") or (None, None)
        right = 0 if self.options.get("causal") else right
        offset = self.options.get("offset", seqlen_k - seqlen_q)
        return (
            _intervals(seqlen_q, seqlen_k, offset, left, right, self.q.device),
            _intervals(seqlen_k, seqlen_q, -offset, right, left, self.q.device),
        )

    def truth(self, *, backward: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The float64 values of out, lse, dq, dk and dv, and the bound of every element."""
        sums = _Sums(self)
        values = {"out": sums.out, "lse": sums.lse[..., 0]} | (sums.gradients() if backward else {})
        return values, sums.bounds(values)

    def check(self, results: Mapping[str, Tensor]) -> Report:
        """Compares any of {out, lse, dq, dk, dv}; AssertionError with a sentence for each tensor that leaves its bound."""
        values, bounds = self.truth(backward=any(name.startswith("d") for name in results))
        report = Report(tuple(_compare(name, got.detach().double(), values[name], bounds[name]) for name, got in results.items()))
        if report.failures:
            raise AssertionError("\n".join(map(str, report.failures)))
        return report


def separable(
    seqlen_q: int, seqlen_k: int, *, batch: int = 1, heads: int = 1, head_dim: int = 64, head_dim_v: int | None = None,
    reach: float = 4.0, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0, **options: Any,
) -> Separable:  # fmt: skip
    """A random problem; reach: the largest a, a power of two (a shift of the whole row, which must change nothing but lse)."""
    if dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype is {dtype}, expected one of {expected}: float16 weights underflow, which no sum here bounds")
    unknown = options.keys() - {"causal", "window", "offset"}
    if unknown:
        raise ValueError(f"got {', '.join(sorted(unknown))}, expected only causal, window and offset: others leave no intervals of keys")
    generator = torch.Generator(device).manual_seed(seed)

    def steps(seqlen: int, largest: float) -> Tensor:
        whole = torch.randint(-STEPS, STEPS + 1, (batch, heads, seqlen), generator=generator, device=device)
        return (whole * (largest / STEPS)).to(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k = (torch.zeros(batch, heads, seqlen, head_dim, dtype=dtype, device=device) for seqlen in (seqlen_q, seqlen_k))
    q[..., 0], q[..., 1] = 1.0, steps(seqlen_q, reach)
    k[..., 0], k[..., 1] = steps(seqlen_k, KEY_RANGE), 1.0
    width = head_dim if head_dim_v is None else head_dim_v
    dlse = normal(batch, heads, seqlen_q).to(torch.float64 if dtype is torch.float64 else torch.float32)
    return Separable(q, k, normal(batch, heads, seqlen_k, width), normal(batch, heads, seqlen_q, width), dlse, options)


def _intervals(count: int, other: int, offset: int, left: int | None, right: int | None, device: torch.device) -> Intervals:
    """Of position i: from i + offset - left to i + offset + right, inside the other sequence."""
    position = torch.arange(count, device=device) + offset
    low = torch.zeros_like(position) if left is None else (position - left).clamp(0, other)
    high = torch.full_like(position, other) if right is None else (position + right + 1).clamp(0, other)
    return Intervals(low, torch.maximum(low, high))


class _Sums:
    """Every sum over visible pairs that the truth and its bounds need, in float64."""

    def __init__(self, problem: Separable) -> None:
        self.problem = problem
        self.scale = problem.scale
        self.a, self.b, self.v = problem.a[..., None], problem.b[..., None], problem.v.double()
        self.keys, self.queries = problem.intervals()
        self.top = self.scale * self.b.amax(-2, keepdim=True)
        self.w = torch.exp(self.scale * self.b - self.top)
        self.row_sum = torch.where(self.keys.lengths[:, None] > 0, self.keys.sum(self.w), 0.0)
        self.seen = self.row_sum > 0.0
        self.inverse = torch.where(self.seen, 1.0 / self.row_sum, 0.0)
        self.out = self.over_keys(self.v)
        self.lse = torch.where(self.seen, self.scale * self.a + self.top + torch.log(self.row_sum), -math.inf)
        self.dout, self.dlse = problem.dout.double(), torch.where(self.seen, problem.dlse.double()[..., None], 0.0)
        self.delta = (self.dout * self.out).sum(-1, keepdim=True) - self.dlse

    def over_keys(self, values: Tensor) -> Tensor:
        """sum_j weights_ij values_j, for every query."""
        return self.keys.sum(self.w * values) * self.inverse

    def over_queries(self, values: Tensor) -> Tensor:
        """sum_i weights_ij values_i, for every key."""
        return self.w * self.queries.sum(values * self.inverse)

    def gradients(self) -> dict[str, Tensor]:
        """From dscores_ij = weights_ij (dout_i v_j - delta_i); beyond their two columns q and k are 0, and so are their gradients."""
        dq, dk = (torch.zeros_like(x, dtype=torch.float64) for x in (self.problem.q, self.problem.k))
        by_key = (self.dout * self.over_keys(self.b * self.v)).sum(-1, keepdim=True) - self.delta * self.over_keys(self.b)
        dq[..., :2] = self.scale * torch.cat([by_key, self.dlse], dim=-1)
        dv = self.over_queries(self.dout)
        for column, factor in enumerate((torch.ones_like(self.a), self.a)):
            pulled = (self.v * self.over_queries(factor * self.dout)).sum(-1, keepdim=True)
            dk[..., column : column + 1] = self.scale * (pulled - self.over_queries(factor * self.delta))
        return {"dq": dq, "dk": dk, "dv": dv}

    def bounds(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The bounds of tier1.py with one exponent for all pairs of a row, and |dout_i v_j| <= |dout_i| |v_j|."""
        problem = self.problem
        dtype = problem.q.dtype
        a = Arithmetic.of(dtype, problem.q.device)
        one, dout, delta = 4 * a.element, self.dout.abs(), self.delta.abs()
        largest = self.scale * (self.b.abs().amax() + self.a.abs())  # score of the row, its maximum included
        exponent = a.product(problem.q.shape[-1]) * largest + 2 * one * largest + a.exponential
        row_sums, column_sums = a.total(self.keys.lengths)[:, None], a.total(self.queries.lengths)[:, None]

        magnitude = self.over_keys(self.v.abs())
        out = (torch.expm1(exponent) * (magnitude + self.out.abs())) * torch.exp(exponent)
        out = out + (a.weights + row_sums + 2 * a.element) * magnitude
        lse = exponent + row_sums + a.exponential + one * (self.lse.nan_to_num(neginf=0.0).abs() + largest)
        lse = torch.where(self.seen, lse, 0.0)

        stored = out + a.stored * (self.out.abs() + out)
        forward = {"out": (stored + SMALLEST[dtype]) * self.seen, "lse": lse[..., 0]}
        if "dq" not in values:
            return forward

        relative = torch.expm1(exponent + lse + one * self.lse.nan_to_num(neginf=0.0).abs())  # of a weight that backward computes again
        product, pulls = a.product(self.v.shape[-1]), (dout * magnitude).sum(-1, keepdim=True)
        from_out = product * (dout * self.out.abs()).sum(-1, keepdim=True) + (dout * stored).sum(-1, keepdim=True)
        delta_error = torch.maximum(from_out, (relative + product + row_sums) * pulls) + one * (delta + 2 * self.dlse.abs())
        # |error of dscores_ij| <= weights_ij (slope_i |dout_i| |v_j| + level_i);   |dscores_ij| <= weights_ij (|dout_i| |v_j| + |delta_i|)
        slope = (1 + relative) * (product + one) + relative + a.weights + one
        level = (1 + relative) * delta_error + (relative + a.weights + one) * delta

        def row(factor: Tensor) -> Tensor:
            pulls = (dout * self.over_keys(factor * self.v.abs())).sum(-1, keepdim=True)
            return (slope + row_sums) * pulls + (level + row_sums * delta) * self.over_keys(factor)

        def column(factor: Tensor) -> Tensor:
            pulls = self.over_queries(factor * slope * dout) + column_sums * self.over_queries(factor * dout)
            levels = self.over_queries(factor * level) + column_sums * self.over_queries(factor * delta)
            return (self.v.abs() * pulls).sum(-1, keepdim=True) + levels

        dq = torch.cat([row(self.b.abs()), row(torch.ones_like(self.b))], dim=-1) * self.scale
        dk = torch.cat([column(torch.ones_like(self.a)), column(self.a.abs())], dim=-1) * self.scale
        dv = self.over_queries((relative + a.weights + 2 * a.element) * dout) + column_sums * self.over_queries(dout)
        gradients = {"dq": dq, "dk": dk, "dv": dv}
        widened = {name: F.pad(bound, (0, values[name].shape[-1] - bound.shape[-1])) for name, bound in gradients.items()}
        return forward | {
            name: bound + UNIT_ROUNDOFF[dtype] * (values[name].abs() + bound) + SMALLEST[dtype] * (bound > 0.0)
            for name, bound in widened.items()
        }
