"""Everything that the CPU kernels compute, as named problems: the shared cases, longer ones, hostile integers, a layer's operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import PagedKVCache, attention_weights, attention_with_cache, attention_with_lse
from fused_attention.layer_ops import gate, norm, projection, rotation
from fused_attention.testing import CASES, Case, Inputs, check
from fused_attention.testing.tier1 import tier1

Results = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Several tiles and blocks with remainders; the shared cases fit one.
LONG = [
    Case("tiles-causal", batch=1, heads=2, kv_heads=1, seqlen_q=149, seqlen_k=163, head_dim=20, head_dim_v=17, causal=True),
    Case("tiles-window", batch=1, heads=2, seqlen_q=70, seqlen_k=261, head_dim=33, head_dim_v=48, window=(40, 7), layout="strided"),
    Case("tiles-options", batch=2, heads=1, seqlen_q=67, seqlen_k=139, head_dim=19, mask="b11k", bias="1hqk", alibi_slopes="h", sinks=True),
    Case("tiles-dropout", batch=1, heads=3, seqlen_q=39, seqlen_k=270, head_dim=16, dropout_p=0.3, softcap=3.0, bias="1h1k"),
    Case("tiles-packed", heads=2, kv_heads=1, lengths_q=(70, 0, 1, 133), lengths_k=(131, 3, 0, 129), head_dim=24, causal=True),
    Case("one-query-of-many", batch=2, heads=6, kv_heads=2, seqlen_q=1, seqlen_k=517, head_dim=21, kv_lengths=((3, 517), (0, 400))),
    Case("few-queries", batch=1, heads=5, seqlen_q=3, seqlen_k=300, head_dim=64, head_dim_v=40, causal=True, layout="transposed"),
    Case("wide", batch=1, heads=1, seqlen_q=35, seqlen_k=67, head_dim=257, head_dim_v=130, layout="offset"),
]


@dataclass(frozen=True)
class Problem:
    """A name, what computes it, and how to judge the results: by a float64 oracle, or by their bits alone."""

    name: str
    run: Callable[[], Results]
    judge: Callable[[Results], None] = lambda results: None


def all_problems() -> Iterator[Problem]:
    for case in CASES:
        yield attention(case)
    for case in LONG:
        for dtype in DTYPES:
            each = replace(case, name=f"{case.name}-{str(dtype).removeprefix('torch.')}", dtype=dtype)
            yield attention(each)
            if case.lengths_q is None:
                yield weights(each)
    yield from pages()
    yield from hostile()
    yield from hostile_pages()
    yield from layer()


def sample() -> Iterator[Problem]:
    """Every option and kind of layout in one type, everything at once in every type, and whatever has more than one tile."""
    for problem in all_problems():
        if "+" not in problem.name:
            yield problem


def attention(case: Case) -> Problem:
    inputs = case.make()
    truth = functools.cache(inputs.truth)
    return Problem(f"attention {case.name}", lambda: inputs.run("cpu"), lambda results: check(results, truth()))


def weights(case: Case) -> Problem:
    """The weights and their mean over heads. With one-hot values out is the weights, so its bound is theirs too."""
    inputs = case.make()
    eye = torch.eye(inputs.k.shape[2], dtype=inputs.k.dtype)
    truth = functools.cache(inputs.changed(v=eye.expand(*inputs.k.shape[:2], *eye.shape)).truth)

    def run() -> Results:
        lse = attention_with_lse(inputs.q, inputs.k, inputs.v, **inputs.options, backend="cpu").lse
        averages = {"weights": False, "mean": True}
        return {name: attention_weights(inputs.q, inputs.k, lse, average_heads=mean, **inputs.options) for name, mean in averages.items()}

    def judge(results: Results) -> None:
        exact, bound, heads = truth(backward=False).out, tier1(truth(backward=False))["out"], inputs.q.shape[1]
        stored, summed = (torch.finfo(dtype).eps for dtype in (case.dtype, torch.promote_types(case.dtype, torch.float32)))
        # Of the mean: one more rounding a head, and the stored one, of numbers that are at most 1 / (1 - p).
        more = (stored + (heads + 1) * summed) / (1 - case.dropout_p if case.dropout_p < 1 else 1.0)
        for name, expected, allowed in (("weights", exact, bound), ("mean", exact.mean(1), bound.mean(1) + more)):
            error = (results[name].double() - expected).abs()
            if not (error <= allowed).all():
                raise AssertionError(f"{name} of {case.name} are off by {(error / allowed).nan_to_num().max():.3g} bounds")

    return Problem(f"weights {case.name}", run, judge)


def pages() -> Iterator[Problem]:
    """Few queries to keys in pages: pages within a tile, across its end, and of several ranges."""
    for dtype in DTYPES:
        for size, rows in ((1, 37), (5, 300), (128, 130), (200, 1100)):
            cache = paged(size, 3 * rows // size + 4, dtype)
            for member, length in enumerate((rows, 1, rows - 9)):
                cache.append(normal(1, 2, length, 32).to(dtype), normal(1, 2, length, 48).to(dtype), members=[member])
            cache.pad_left(torch.tensor([0, 0, 11]))
            options = {"causal": True, "softcap": 3.0, "sinks": normal(4), "alibi_slopes": normal(4)} if size == 5 else {}
            q = normal(3, 4, 2, 32).to(dtype)
            seen = {"kv_lengths": cache.ranges, **options}
            truth = functools.cache(functools.partial(Inputs(q, *cache.keys_of(range(3)), seen, q, None).truth, backward=False))
            run = functools.partial(attend_pages, q, cache, **options)
            yield Problem(f"pages of {size} {dtype}", run, lambda results, truth=truth: check(results, truth()))


def paged(size: int, count: int, dtype: torch.dtype = torch.float32, members: int = 3) -> PagedKVCache:
    cache = PagedKVCache(members, count, 2, 32, 48, page_size=size, dtype=dtype)
    for x in (cache.k, cache.v):
        x.copy_(normal(*x.shape))
    return cache


def attend_pages(q: Tensor, cache: PagedKVCache, **options: Any) -> Results:
    return {"out": attention_with_cache(q, cache, backend="cpu", **options)}


def hostile() -> Iterator[Problem]:
    """Integers far outside of what is legal, in every place where the kernels take some; only safety is promised."""
    ends = torch.tensor([-(2**63), -(2**31) - 1, -1, 0, 1, 34, 35, 36, 2**31, 2**62, 2**63 - 1])
    members = len(ends)
    base = Case("lengths", batch=members, heads=2, kv_heads=1, seqlen_q=17, seqlen_k=35).make()
    ranges = torch.stack([ends, ends.roll(4)], -1)
    for name, options in {
        "kv_lengths": {"kv_lengths": ends},
        "ranges": {"kv_lengths": ranges, "causal": True},
        "offsets": {"offset": ends, "window": (3, 2)},
        "both": {"kv_lengths": ranges, "offset": ends.flip(0), "window": (2**62, 0)},
    }.items():
        yield unjudged(f"hostile {name}", base.changed(options=options))
    packed = Case("members", heads=2, lengths_q=(5,) * (members - 1), lengths_k=(9,) * (members - 1), causal=True).make()
    for name, options in {
        "cu_seqlens_q": {"cu_seqlens_q": ends.roll(1)},
        "cu_seqlens_k": {"cu_seqlens_k": ends.flip(0)},
        "cu_seqlens": {"cu_seqlens_q": ends, "cu_seqlens_k": ends.roll(3), "kv_lengths": ends[1:], "offset": ends[:-1]},
    }.items():
        # Members that overlap write the same rows, in whatever order threads come to them.
        yield unjudged(f"hostile {name}", packed.changed(options=options), repeats=False)


def hostile_pages() -> Iterator[Problem]:
    """Page tables and ranges that hold anything; the host believes in ten pages each."""
    numbers = torch.tensor([-(2**31), -9, -1, 0, 1, 29, 30, 31, 2**31 - 1], dtype=torch.int32)
    members = len(numbers)
    for size in (1, 7, 128):
        for name, ranges in {
            "ends": torch.stack([torch.zeros_like(numbers), numbers], 1),
            "ranges": torch.stack([numbers.roll(4), numbers], 1),
            "far": torch.tensor([[0, 10**6]], dtype=torch.int32).repeat(members, 1),
        }.items():
            cache = paged(size, 30, members=members)
            cache._lengths = [10 * size] * members
            cache.page_table.copy_(torch.stack([numbers.roll(shift) for shift in range(members)], 1).repeat(1, 4)[:, :30])
            cache.ranges.copy_(ranges)
            for rows in (1, 2, 4):
                run = functools.partial(attend_pages, normal(members, 2 * rows, 1, 32), cache, causal=True)
                yield Problem(f"hostile pages of {size}, {name}, {rows} rows", run)


def unjudged(name: str, inputs: Inputs, repeats: bool = True) -> Problem:
    def run() -> Results:
        results = inputs.run("cpu")
        return results if repeats else {}

    return Problem(name, run)


def layer() -> Iterator[Problem]:
    """The operators of layer_ops, forward and backward, on sizes that end inside a vector, a tile and a block."""
    table = normal(37, 8)
    sizes = ((1, 1, 1), (9, 17, 33), (70, 130, 67), (131, 258, 34))
    for rows, steps, columns in sizes:
        x, weight, bias = normal(rows, steps), normal(2 * columns, steps), normal(2 * columns)
        for activation in (None, "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"):
            residual = normal(rows, columns if activation in ("swiglu", "geglu") else 2 * columns)
            call = functools.partial(product, activation=activation)
            yield operation(f"linear {activation} {rows} {steps} {columns}", call, x, weight, bias, residual)
            yield operation(f"linear {activation} strided {rows}", call, x.mT.contiguous().mT, weight.mT.contiguous().mT, bias, residual)
        for centred in (True, False):
            call = functools.partial(normalise, centred=centred)
            yield operation(f"norm {centred} {rows} {steps}", call, x, normal(rows, steps), normal(steps), normal(steps))
        for activation in ("gelu", "relu", "silu", "gelu_tanh", "swiglu", "geglu"):
            call = functools.partial(activate, activation=activation)
            yield operation(f"gate {activation} {rows}", call, normal(rows, 2 * columns), bias)
    for interleaved in (False, True):
        call = functools.partial(rotate, table=table, interleaved=interleaved)
        yield operation(f"rotate {interleaved}", call, normal(2, 3, 37, 19))
        yield operation(f"rotate {interleaved} strided", call, normal(2, 37, 3, 16).transpose(1, 2))


def product(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, activation: str | None) -> Tensor:
    return projection.linear_op(x, weight, bias, residual, activation, activation is not None)[0]


def normalise(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, centred: bool) -> Tensor:
    out, summed, *_ = norm.add_norm_op(x, residual, weight, bias, 1e-5, centred)
    return out + summed


def activate(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    return gate.activate(x, bias, activation)


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    return rotation.rotate_op(x, table.cos(), table.sin(), interleaved, False)


def operation(name: str, function: Callable[..., Tensor], *tensors: Tensor) -> Problem:
    def run() -> Results:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, normal(*out.shape), allow_unused=True)
        found = {f"d{number}": gradient for number, gradient in enumerate(gradients) if gradient is not None}
        return {"out": out.detach()} | found

    return Problem(name, run)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
