"""The worst case of every element: how far a correct kernel may stand from the truth, computed for each input.

    error(out_i)  <=  sum_j A_ij expm1(e_ij) (|v_j| + |out_i|)  +  rounding of the weights, of the sums and of the result

e_ij is the error of a score, which enters the weights A as exp(e).  Gradients follow the same way through dS = A (dP - delta + dlse).
Nothing is tuned by hand.  Where the bound is 0 (a row that sees nothing, a hidden key) the result must be exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Call, Head, Truth

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
LARGEST_EXPONENT = 50.0  # exp of more says no more than "no bound here", and must not overflow where the weight is 0


@dataclass(frozen=True)
class Arithmetic:
    """The roundings of an implementation, as unit roundoffs."""

    element: float  # one elementwise operation of the accumulating type
    accumulate: float  # one step of a sum of products
    stored: float  # q, k, v, out and their gradients
    weights: float  # weights and their gradients as operands of a product; 0 where they stay in the accumulating type
    underflow: float  # absolute error of a weight too small for its type
    exponential: float
    block: int | None = None  # keys that a tensor core sums at a time; None: one after the other

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Arithmetic:
        """What a call in this type on this device may do and still count as accurate.

        float64 counts twice, for the oracle errs as much as the kernel.  Tensor cores truncate when they align summands: 2**-22
        (Fasi et al., PeerJ CS 330); a CPU's fused multiply-add rounds each step to 2**-24, however BLAS orders them.
        """
        stored = UNIT_ROUNDOFF[dtype]
        if dtype is torch.float64:
            return cls(2 * stored, 2 * stored, stored, 0.0, SMALLEST[dtype], 2.0**-50)
        narrow = dtype in (torch.float16, torch.bfloat16)
        weights, underflow = stored if narrow else 0.0, 2.0**-25 if dtype is torch.float16 else SMALLEST[torch.float32]
        if device.type == "cpu":
            # PyTorch's 16-bit CPU kernel takes exp from a cubic good to 2**-13: enough for weights that are rounded to 16 bits.
            return cls(2.0**-24, 2.0**-24, stored, weights, underflow, 2.0**-13 if narrow else 2.0**-22)
        return cls(2.0**-24, 2.0**-22, stored, weights, underflow, 2.0**-21, block=64)

    def product(self, length: int) -> float:
        """Error of a dot product of this length, beside the sum of its magnitudes."""
        return (length + 8) * self.accumulate

    def total(self, terms: Tensor) -> Tensor:
        """Error of a running sum of so many terms, rescalings included, beside the sum of their magnitudes."""
        if self.block is None:
            return (terms + 8.0) * self.accumulate
        return (torch.ceil(terms / self.block) + self.block / 8 + 4.0) * self.accumulate


class Forward(NamedTuple):
    """Bounds of the forward pass of one head."""

    scores: Tensor
    exponent: Tensor  # of what exp is given, its own error included; 0 where hidden
    sink_exponent: Tensor
    sums: Tensor  # relative error of a sum over the row
    out: Tensor  # before it is rounded to its type
    lse: Tensor


class Sum:
    """A gradient as a sum over pairs: the error of its terms, their magnitude, and how many one element adds up."""

    def __init__(self, value: Tensor) -> None:
        self.error, self.magnitude, self.terms = torch.zeros_like(value), torch.zeros_like(value), torch.zeros_like(value)

    def add(self, view: Callable[[Tensor], Tensor], error: Tensor, magnitude: Tensor, terms: Tensor | float) -> None:
        view(self.error).add_(error)
        view(self.magnitude).add_(magnitude)
        view(self.terms).add_(terms)

    def bound(self, value: Tensor, dtype: torch.dtype, a: Arithmetic) -> Tensor:
        bound = self.error + a.total(self.terms) * self.magnitude
        touched = torch.where(bound > 0.0, SMALLEST[dtype], 0.0)
        return bound + UNIT_ROUNDOFF[dtype] * (value.abs() + bound) + touched


def tier1(truth: Truth, arithmetic: Arithmetic | None = None) -> dict[str, Tensor]:
    """The elementwise bound of every value of the truth, under the same names."""
    call = truth.call
    a = arithmetic or Arithmetic.of(truth.dtypes["out"], call.q.device)
    bounds = {"out": torch.zeros_like(truth.out), "lse": torch.zeros_like(truth.lse)}
    sums = {name: Sum(value) for name, value in truth.values.items() if name not in bounds}
    for member in range(call.batch):
        for index in range(call.heads):
            head = call.head(member, index)
            forward = _forward(call, head, a)
            stored = forward.out + a.stored * (head.out.abs() + forward.out) + SMALLEST[truth.dtypes["out"]]
            call.queries(bounds["out"], member)[index] = stored * head.visible.any(dim=1, keepdim=True)
            call.queries(bounds["lse"], member)[index] = forward.lse
            if sums:
                _backward(call, member, index, head, forward, a, sums)
    if call.starts_q is not None and call.sinks is not None:
        bounds["lse"][:, call.unused] = 8 * a.element * call.sinks.abs()[:, None] + a.exponential
        if sums:
            dlse = call.dlse[:, call.unused].abs()
            sums["dsinks"].add(lambda t: t, 4 * a.exponential * dlse.sum(dim=1), dlse.sum(dim=1), dlse.shape[1])
    return bounds | {name: total.bound(truth.values[name], truth.dtypes[name], a) for name, total in sums.items()}


def _forward(call: Call, head: Head, a: Arithmetic) -> Forward:
    visible = head.visible.double()
    scores = abs(call.scale) * a.product(head.q.shape[1]) * (head.q.abs() @ head.k.abs().T)
    if call.softcap is not None:
        scores = _steepness(call, head) * scores + scores**2 / call.softcap + 8 * a.element * head.capped.abs()
    if head.slope is not None:
        scores = scores + 3 * a.element * (head.capped.abs() + (head.slope * head.distance).abs())
    if head.bias is not None:
        scores = scores + 3 * a.element * ((head.scores - head.bias).abs() + head.bias.abs())

    row_max = head.row_max.abs()[:, None]
    exponent = (scores + 4 * a.element * (head.scores.abs() + row_max) + a.exponential).clamp(max=LARGEST_EXPONENT) * visible
    sink = torch.zeros_like(head.row_max) if head.sink is None else head.sink.abs().expand_as(head.row_max)
    sink_exponent = (4 * a.element * (sink + row_max[:, 0]) + a.exponential).clamp(max=LARGEST_EXPONENT)

    relative = torch.expm1(exponent)
    growth = (head.weights * relative).sum(dim=1) + head.sink_weight * torch.expm1(sink_exponent)
    shrink = (head.weights * torch.exp(-exponent)).sum(dim=1) + head.sink_weight * torch.exp(-sink_exponent)
    shrink = torch.where(shrink > 0.0, shrink, 1.0)  # a row that sees nothing has neither
    sums = a.total(visible.sum(dim=1))
    largest = torch.cat([head.weights, head.sink_weight[:, None]], dim=1).amax(dim=1, keepdim=True)

    factor, magnitude = _factor(head), head.v.abs()
    out = ((head.weights * relative * factor) @ magnitude + head.out.abs() * growth[:, None]) / shrink[:, None]
    out = out + (a.weights + sums[:, None] + 2 * a.element) * ((head.weights * factor) @ magnitude)
    out = out + a.underflow * largest * (factor @ magnitude)
    lse = torch.maximum(torch.log1p(growth), -torch.log(shrink)) + sums + a.exponential
    lse = lse + 4 * a.element * (head.lse.nan_to_num(neginf=0.0).abs() + row_max[:, 0])
    return Forward(scores, exponent, sink_exponent, sums, out, torch.where(head.lse == -math.inf, 0.0, lse))


def _backward(call: Call, member: int, index: int, head: Head, forward: Forward, a: Arithmetic, sums: dict[str, Sum]) -> None:
    """Adds what one head gives to the bound of every gradient."""
    visible, factor = head.visible.double(), _factor(head)
    lse = head.lse.nan_to_num(neginf=0.0).abs()

    # A backward pass recomputes the weights from the scores and the stored lse.
    recomputed = forward.lse + 4 * a.element * lse
    exponent = (forward.exponent + recomputed[:, None]).clamp(max=LARGEST_EXPONENT)
    weights_error = head.weights * torch.expm1(exponent) + a.underflow * visible
    dweights = (head.dout @ head.v.T) * factor
    dweights_error = a.product(head.v.shape[1]) * (head.dout.abs() @ head.v.abs().T) * factor

    # delta is the row's sum of dout * out, or of weights * dweights: an implementation may choose.
    delta, dlse = (head.dout * head.out).sum(dim=1), head.dlse * (head.lse > -math.inf)
    out_error = forward.out + a.stored * (head.out.abs() + forward.out)
    from_out = a.product(head.v.shape[1]) * (head.dout * head.out).abs().sum(dim=1) + (head.dout.abs() * out_error).sum(dim=1)
    from_weights = (weights_error * dweights.abs() + head.weights * dweights_error).sum(dim=1)
    from_weights = from_weights + forward.sums * (head.weights * dweights.abs()).sum(dim=1)
    delta_error = torch.maximum(from_out, from_weights) + 4 * a.element * (delta.abs() + dlse.abs())

    centred = dweights - (delta - dlse)[:, None]
    centred_error = dweights_error + delta_error[:, None] + 4 * a.element * dweights.abs()
    dscores = head.weights * centred
    error = (head.weights + weights_error) * centred_error * visible + weights_error * centred.abs()
    error = error + (a.weights + 4 * a.element) * dscores.abs() + a.underflow * visible

    if head.bias is not None:
        shape = head.bias.shape
        pairs = 1 + sum(whole for whole, size in zip(visible.shape, shape, strict=True) if size == 1)  # along the rows, then across them
        sums["dbias"].add(lambda t: call.pairs(t, member, index), error.sum_to_size(shape), dscores.abs().sum_to_size(shape), pairs)
    if head.slope is not None:
        far = head.distance
        sums["dalibi_slopes"].add(
            lambda t: call.slope(t, member, index), (error * far).sum(), (dscores.abs() * far).sum(), sum(visible.shape)
        )
    if head.sink is not None:
        sink_weight, pull = head.sink_weight, (dlse - delta).abs()
        sink_error = sink_weight * torch.expm1((forward.sink_exponent + recomputed).clamp(max=LARGEST_EXPONENT))
        sink_error = (sink_weight + sink_error) * delta_error + sink_error * pull
        sums["dsinks"].add(lambda t: t[index], sink_error.sum(), (sink_weight * pull).sum(), float(len(pull)))

    products, products_error = dscores, error
    if call.softcap is not None:
        steepness = _steepness(call, head)
        steepness_error = 2 * head.capped.abs() / call.softcap**2 * forward.scores + (forward.scores / call.softcap) ** 2 + 8 * a.element
        products = dscores * steepness
        products_error = error * steepness + (dscores.abs() + error) * steepness_error * visible + a.underflow * visible
    scale, rows, columns = abs(call.scale), visible.sum(dim=0)[:, None], visible.sum(dim=1)[:, None]
    kv_head, q, k = index // call.group, scale * head.q.abs(), scale * head.k.abs()
    sums["dq"].add(lambda t: call.queries(t, member)[index], products_error @ k, products.abs() @ k, columns)
    sums["dk"].add(lambda t: call.keys(t, member)[kv_head], products_error.T @ q, products.abs().T @ q, rows)
    dropped, dropped_error = head.weights * factor, (weights_error + (a.weights + 2 * a.element) * head.weights) * factor
    sums["dv"].add(lambda t: call.keys(t, member)[kv_head], dropped_error.T @ head.dout.abs(), dropped.T @ head.dout.abs(), rows)


def _factor(head: Head) -> Tensor:
    visible = head.visible.double()
    return visible if head.dropout is None else visible * head.dropout


def _steepness(call: Call, head: Head) -> Tensor:
    """The softcap's derivative, 1 - tanh**2."""
    return 1.0 - (head.capped / (call.softcap or math.inf)) ** 2
