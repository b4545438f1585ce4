"""Fused attention, backward: the scores are computed again, tile by tile, in two passes that need no atomics and are deterministic.

    dv = dropout(p)^T dout,   dk = scale dcap^T q,   dq = scale dcap k,   dcap = ds * softcap'(scale q k^T)

with p and ds as in differentiate.py. Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import bias as biases
from . import dropout as drop
from . import mask as masks
from . import matmul, scores
from . import visits as visit
from .differentiate import operands, probabilities, score_gradients
from .launch import launch
from .options import Options
from .softmax import LOG2_E
from .tensor import load_numbers, load_tile, rows_view, store_numbers, store_tile, view
from .tiles import TileConfig


class Wanted(NamedTuple):
    """The gradients of a call, with the shapes and dtypes of its inputs; None where nobody asked."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    options: Options, wanted: frozenset[str], tile: Callable[[str], TileConfig], split: bool = False,
) -> Wanted:  # fmt: skip
    """The gradients named in wanted, of a forward whose out and lse are given.

    tile(name): the tile of a pass; split: dk and dv in passes of their own, where one program can't hold both.
    """
    # Packed rows that belong to no member are visited by no program.
    new = torch.empty_like if options.cu_seqlens_q is None else torch.zeros_like
    dq, dk, dv = (new(x) if name in wanted else None for name, x in (("q", q), ("k", k), ("v", v)))
    shares = biases.Shares.of(options.bias if "bias" in wanted else None, lse, k)
    slopes = options.alibi_slopes if "alibi_slopes" in wanted else None
    row_slopes = None if slopes is None else torch.empty_like(lse)
    sight, heads = masks.sight(q, k, options), q.shape[1]
    shape = {"GROUP": heads // k.shape[1], "HEAD_DIM": q.shape[-1], "HEAD_DIM_V": v.shape[-1]}
    phases = {"DIVIDED": masks.divides_tiles(options), "FIRST": masks.first_phase(options)}
    key_phases = phases | {"FIRST": masks.first_phase_of_queries(options)}

    delta = _delta(out, dout, dlse, lse, sight, tile("delta"))
    shared = operands(dout, q, k, v, lse, delta, sight, options)
    for name, dk_part, dv_part in (("dk", dk, None), ("dv", None, dv)) if split else (("dkv", dk, dv),):
        columns = None if name == "dv" else shares.columns
        if dk_part is not None or dv_part is not None or columns is not None:
            chosen = tile(name)
            programs = masks.programs(sight.seqlen_k, sight.batch, sight.cu_k, chosen.block_n) * k.shape[1]
            visits = visit.of_queries(options.mask, chosen.block_m, chosen.block_n)
            results = view(dk_part), view(dv_part), rows_view(columns), k.shape[1]
            launch(key_value_kernel, programs, q.device, *shared, visits, *results, **shape, **key_phases, **chosen.constants())
    if dq is not None or shares.rows is not None or row_slopes is not None:
        chosen = tile("dq")
        visits = visit.of_keys(options.mask, chosen.block_m, chosen.block_n)
        programs = masks.programs(sight.seqlen_q, sight.batch, sight.cu_q, chosen.block_m) * heads
        results = view(dq), rows_view(shares.rows), rows_view(row_slopes), heads
        launch(query_kernel, programs, q.device, *shared, visits, *results, **shape, **phases, **chosen.constants())
    if shares.pairs is not None:
        biases.pair_pass(shared, shares.pairs, heads, tile("dbias"), shape)
    return Wanted(
        q=dq,
        k=dk,
        v=dv,
        bias=None if options.bias is None else shares.gradient(options.bias),
        alibi_slopes=None if slopes is None or row_slopes is None else _slope_gradient(slopes, row_slopes, sight),
        sinks=_sink_gradient(options.sinks, lse, delta) if options.sinks is not None and "sinks" in wanted else None,
    )


def _delta(
    out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None, lse: torch.Tensor, sight: masks.Sight, tile: TileConfig
) -> torch.Tensor:
    delta = torch.empty_like(lse)
    if sight.cu_q is not None:  # rows of no member: their out is 0
        delta = torch.zeros_like(lse) if dlse is None else -dlse.to(lse.dtype)
    programs = masks.programs(sight.seqlen_q, sight.batch, sight.cu_q, tile.block_m) * out.shape[1]
    views = view(out), view(dout), rows_view(dlse), rows_view(delta)
    constants = {"BLOCK_M": tile.block_m, "num_warps": tile.num_warps}
    launch(delta_kernel, programs, out.device, *views, sight, out.shape[1], HEAD_DIM_V=out.shape[-1], **constants)
    return delta


def _slope_gradient(slopes: torch.Tensor, row_slopes: torch.Tensor, sight: masks.Sight) -> torch.Tensor:
    heads = slopes.shape[-1]
    members = row_slopes.new_empty(sight.batch, heads)
    launch(member_sum_kernel, sight.batch * heads, slopes.device, rows_view(row_slopes), members, sight, heads, BLOCK=1024)
    return (members if slopes.dim() == 2 else members.sum(0)).to(slopes.dtype)


def _sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sink's probability times (0 - delta), for it has no value row, summed over its head."""
    by_head = sinks.to(lse.dtype)[:, None]  # broadcasts against (batch, heads, seqlen_q) and (heads, total) alike
    p = torch.where(lse == -torch.inf, 0.0, torch.exp(by_head - lse))
    return -(p * delta).sum((0, 2) if lse.dim() == 3 else 1).to(sinks.dtype)


@triton.jit
def member_sum_kernel(numbers, sums, sight, heads, BLOCK: tl.constexpr):
    """One program adds up the numbers of one member's rows of one head."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    member = masks.locate(sight, batch)
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    for start in range(0, member.seqlen_q, BLOCK):
        total += load_numbers(numbers, batch, head, member.start_q + start, member.seqlen_q - start, 0.0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def delta_kernel(out, dout, dlse, delta, sight, heads, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr):
    """What every dp of a row loses: rowsum(dout out), less the gradient of its lse."""
    batch, head, start_m = masks.query_tile(sight, heads, BLOCK_M)
    member = masks.locate(sight, batch)
    at, last = member.start_q + start_m, member.seqlen_q - start_m
    if last <= 0:
        return
    out_tile = load_tile(out, batch, head, at, 0, last, BLOCK_M, HEAD_DIM_V)
    dout_tile = load_tile(dout, batch, head, at, 0, last, BLOCK_M, HEAD_DIM_V)
    total = matmul.row_products(out_tile, dout_tile)
    if dlse is not None:
        total -= load_numbers(dlse, batch, head, at, last, 0.0, BLOCK_M).to(total.dtype)
    store_numbers(delta, batch, head, at, last, total, BLOCK_M)


@triton.jit
def key_value_kernel(
    q, k, v, dout, lse, delta, sight, terms, mask, bias, dropout, visits, dk, dv, dbias, kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, FIRST: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N rows of one kv head's dk and dv, and the sums over queries of dbias; absent ones are None.

    Tiles are transposed, (keys, queries): p^T and ds^T come out as the left operands of dv and dk.
    """
    ACC: tl.constexpr = matmul.accumulate_dtype(q.ptr.dtype.element_ty)
    UNIT: tl.constexpr = 1.0 if bias is not None else LOG2_E
    batch, kv_head, start_n = masks.key_tile(sight, kv_heads, BLOCK_N)
    member = masks.locate(sight, batch)
    at, last = member.start_k + start_n, member.seqlen_k - start_n
    if last <= 0:
        return
    first_real, last_real = member.begin - start_n, member.end - start_n
    cols = start_n + tl.arange(0, BLOCK_N)[:, None]
    k_tile = load_tile(k, batch, kv_head, at, first_real, last_real, BLOCK_N, HEAD_DIM)
    v_tile = load_tile(v, batch, kv_head, at, first_real, last_real, BLOCK_N, HEAD_DIM_V)
    dk_acc, dv_acc = matmul.zeros(BLOCK_N, HEAD_DIM, ACC), matmul.zeros(BLOCK_N, HEAD_DIM_V, ACC)

    tiles = masks.query_tiles(sight, member, start_n, BLOCK_M, BLOCK_N)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        slope = scores.slope(terms, batch, head, ACC)
        dbias_acc = tl.zeros([BLOCK_N], ACC)
        listed = visit.find(visits, batch, head, start_n, BLOCK_N)
        for PHASE in tl.static_range(FIRST, 3):
            low, high = masks.phase(tiles, PHASE, FIRST)
            low, high = visit.turns(visits, listed, low, high, BLOCK_M)
            for turn in tl.range(low, high, BLOCK_M):
                start_m = visit.start(visits, listed, turn, BLOCK_M)
                at_m, last_m = member.start_q + start_m, member.seqlen_q - start_m
                q_tile = load_tile(q, batch, head, at_m, 0, last_m, BLOCK_M, HEAD_DIM)
                dout_tile = load_tile(dout, batch, head, at_m, 0, last_m, BLOCK_M, HEAD_DIM_V)
                row_lse = load_numbers(lse, batch, head, at_m, last_m, float("inf"), BLOCK_M)[None, :]
                rows = start_m + tl.arange(0, BLOCK_M)
                seen = masks.visible(sight, member, mask, batch, head, rows[None, :], cols) if PHASE != 1 else None
                products = matmul.contract(k_tile, q_tile, PRECISION)
                capped = scores.cap(products, terms, UNIT)
                s = scores.score(capped, slope, bias, member, batch, head, rows[None, :], cols, seen, UNIT)
                # In a full tile every row is there, but the select saves registers: on sm_90 at head_dim 128 it takes 225 of 248.
                here = s != float("-inf") if PHASE != 1 else (rows < member.seqlen_q)[None, :]
                p = tl.where(here, probabilities(s, row_lse, UNIT), 0.0)
                factor = drop.transposed_factor(dropout, batch * (kv_heads * GROUP) + head, rows[:, None], start_n, ACC, BLOCK_N)
                if dv is not None:
                    dv_acc = matmul.add_product(dv_acc, p if factor is None else p * factor, dout_tile, PRECISION)
                if dk is not None or dbias is not None:
                    row_delta = load_numbers(delta, batch, head, at_m, last_m, 0.0, BLOCK_M)[None, :]
                    ds = score_gradients(p, matmul.contract(v_tile, dout_tile, PRECISION), row_delta, factor, s, PHASE != 1)
                    if dbias is not None:
                        dbias_acc += tl.sum(ds, 1)
                    if dk is not None:
                        dk_acc = matmul.add_product(dk_acc, scores.uncap(ds, capped, terms, UNIT), q_tile, PRECISION)
        if dbias is not None:
            store_numbers(dbias, batch, head, start_n, last, dbias_acc, BLOCK_N)

    if dk is not None:
        store_tile(dk, batch, kv_head, at, last, matmul.scale(dk_acc, terms.scale), BLOCK_N, HEAD_DIM)
    if dv is not None:
        store_tile(dv, batch, kv_head, at, last, dv_acc, BLOCK_N, HEAD_DIM_V)


@triton.jit
def query_kernel(
    q, k, v, dout, lse, delta, sight, terms, mask, bias, dropout, visits, dq, dbias, dslope, heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, FIRST: tl.constexpr, DIVIDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head's dq, and the sums over keys of dbias and of the slope's gradient.

    Absent ones are None.
    """
    ACC: tl.constexpr = matmul.accumulate_dtype(q.ptr.dtype.element_ty)
    UNIT: tl.constexpr = 1.0 if bias is not None else LOG2_E
    batch, head, start_m = masks.query_tile(sight, heads, BLOCK_M)
    member = masks.locate(sight, batch)
    at_m, last_m = member.start_q + start_m, member.seqlen_q - start_m
    if last_m <= 0:
        return
    rows = start_m + tl.arange(0, BLOCK_M)[:, None]
    q_tile = load_tile(q, batch, head, at_m, 0, last_m, BLOCK_M, HEAD_DIM)
    dout_tile = load_tile(dout, batch, head, at_m, 0, last_m, BLOCK_M, HEAD_DIM_V)
    row_lse = load_numbers(lse, batch, head, at_m, last_m, float("inf"), BLOCK_M)[:, None]
    row_delta = load_numbers(delta, batch, head, at_m, last_m, 0.0, BLOCK_M)[:, None]
    slope = scores.slope(terms, batch, head, ACC)
    dq_acc = matmul.zeros(BLOCK_M, HEAD_DIM, ACC)
    dbias_acc, dslope_acc = tl.zeros([BLOCK_M], ACC), tl.zeros([BLOCK_M], ACC)

    tiles = masks.key_tiles(sight, member, start_m, BLOCK_M, BLOCK_N)
    listed = visit.find(visits, batch, head, start_m, BLOCK_M)
    for PHASE in tl.static_range(FIRST, 3):
        low, high = masks.phase(tiles, PHASE, FIRST)
        low, high = visit.turns(visits, listed, low, high, BLOCK_N)
        for turn in tl.range(low, high, BLOCK_N):
            start_n = visit.start(visits, listed, turn, BLOCK_N)
            at, first, last = member.start_k + start_n, member.begin - start_n, member.end - start_n
            k_tile = load_tile(k, batch, head // GROUP, at, first, last, BLOCK_N, HEAD_DIM)
            v_tile = load_tile(v, batch, head // GROUP, at, first, last, BLOCK_N, HEAD_DIM_V)
            cols = start_n + tl.arange(0, BLOCK_N)[None, :]
            seen = masks.visible(sight, member, mask, batch, head, rows, cols) if PHASE != 1 else None
            products = matmul.contract(q_tile, k_tile, PRECISION)
            capped = scores.cap(products, terms, UNIT)
            s = scores.score(capped, slope, bias, member, batch, head, rows, cols, seen, UNIT)
            factor = drop.factor(dropout, batch * heads + head, rows, start_n, ACC, BLOCK_N)
            dp = matmul.contract(dout_tile, v_tile, PRECISION)
            ds = score_gradients(probabilities(s, row_lse, UNIT), dp, row_delta, factor, s, PHASE != 1)
            if dbias is not None:
                dbias_acc += tl.sum(ds, 1)
            if dslope is not None:
                dslope_acc -= tl.sum(ds * scores.distance(member, rows, cols, ACC), 1)
            if PHASE != 1 and DIVIDED:
                k_tile, _ = matmul.finite_rows(k_tile)
            if dq is not None:
                dq_acc = matmul.add_product(dq_acc, scores.uncap(ds, capped, terms, UNIT), k_tile, PRECISION)

    if dq is not None:
        store_tile(dq, batch, head, at_m, last_m, matmul.scale(dq_acc, terms.scale), BLOCK_M, HEAD_DIM)
    if dbias is not None:
        store_numbers(dbias, batch, head, at_m, last_m, dbias_acc, BLOCK_M)
    if dslope is not None:
        store_numbers(dslope, batch, head, at_m, last_m, dslope_acc, BLOCK_M)
