"""Forward with a warp that only loads and two groups of warps that only compute, for sm_90: FlashAttention-3 in Gluon.

    producer    for each tile of keys:  wait until its slots are empty, fill them by TMA
    consumer    issue s = q k_i^T and acc += p v_(i-1);  wait for s;  p = softmax(s);  wait for acc;  acc *= rescale        64 rows each

While one consumer takes exponentials the tensor cores work for its own last product and for the other consumer; with PING_PONG they take
turns to issue. Programs are persistent, so that the producer fetches the next tile of queries while the last one is written. Gluon cannot
be interpreted, and no GPU has run this: its numbers, its barriers and its speed are unproven.

Source: Shah et al., "FlashAttention-3", 2024, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from fused_attention.triton_kernels.launch import launch
from fused_attention.triton_kernels.options import Options
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import calls, order

ROWS = 64  # of a consumer: a product's
LN_2 = gl.constexpr(math.log(2))
LOG2_E = math.log2(math.e)
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
TILES = {64: (128, 2), 128: (128, 2), 256: (64, 2)}  # keys of a tile, slots: out lies where q was, or 256 would not fit
REGISTERS = 168  # of a thread at the start: 12 warps, of which the producer gives most of its own to the consumers
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)


class Ring(NamedTuple):
    """Tiles in shared memory that the producer fills and a consumer empties, with the barriers that say so."""

    slots: Any
    full: Any
    empty: Any


class Plan(NamedTuple):
    """What every warp has to know to find its place."""

    seqlen_q: Any
    seqlen_k: Any
    heads: Any
    batch_heads: Any
    row_tiles: Any
    section: Any


class Place(NamedTuple):
    """A tile of queries and the tiles of keys it sees, which are visited from the last to the first."""

    row: Any  # of q with the heads below each other
    key: Any  # the first row of k
    start_m: Any
    tiles: Any
    masked: Any  # so many of them, the first visited, hide some pairs


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, options: Options, *, ping_pong: bool = False
) -> None:
    """As triton_kernels.forward, of tensors (batch, heads, seqlen, head_dim); NotImplementedError where calls.check or check refuses."""
    check(q, k, v, out, options)
    (batch, heads, seqlen_q, head_dim), (_, kv_heads, seqlen_k, _) = q.shape, k.shape
    block_n, slots = TILES[head_dim]
    row_tiles, batch_heads = seqlen_q // (2 * ROWS), batch * heads
    section = order.section(2 * k[0, 0].nbytes, batch * kv_heads) * (heads // kv_heads)
    programs = batch_heads * row_tiles
    launch(
        warp_specialized_forward_kernel, order.persistent(programs, q.device), q.device,
        descriptor(q, ROWS), descriptor(k, block_n), descriptor(v, block_n), descriptor(out, ROWS), lse,
        Plan(seqlen_q, seqlen_k, heads, batch_heads, row_tiles, section), programs, options.scale * LOG2_E,
        GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_M=2 * ROWS, BLOCK_N=block_n, SLOTS=slots,
        CAUSAL=options.window_right is not None, PING_PONG=ping_pong, num_warps=4, num_stages=slots, maxnreg=REGISTERS,
    )  # fmt: skip


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, options: Options) -> None:
    """NotImplementedError with a sentence: heads lie below each other, so that no tile may reach into the next."""
    calls.check(q, k, v, options)
    seqlen_q, seqlen_k, block = q.shape[2], k.shape[2], 2 * ROWS
    if not all(tensor.is_contiguous() for tensor in (q, k, v, out)):
        raise NotImplementedError("q, k, v and out have to be contiguous here: one descriptor reads the rows of all heads")
    if seqlen_q % block or seqlen_k % block or (options.window_right is not None and seqlen_q > seqlen_k):
        raise NotImplementedError(
            f"{seqlen_q} queries and {seqlen_k} keys: give multiples of {block}, and with causal no more queries than keys"
        )


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    block = [rows, x.shape[-1]]
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), block, gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype]))


@gluon.jit
def warp_specialized_forward_kernel(
    q, k, v, out, lse, plan, programs, unit,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
    CAUSAL: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """A program computes one tile of BLOCK_M rows after the other."""
    q_ring = make_ring(q, 2, 1)
    k_ring, v_ring = make_ring(k, SLOTS, 2), make_ring(v, SLOTS, 2)
    turns = make_barriers(2, 1)
    if PING_PONG:
        mbarrier.arrive(turns.index(0), count=1)
    rings = (q_ring, k_ring, v_ring)
    gl.warp_specialize(
        [
            (first_consumer, (rings, turns, out, lse, plan, programs, unit, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, PING_PONG)),
            (second_consumer, (rings, turns, out, lse, plan, programs, unit, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, PING_PONG)),
            (produce, (rings, q, k, v, plan, programs, GROUP, BLOCK_M, BLOCK_N, CAUSAL)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def make_ring(tensor, SLOTS: gl.constexpr, READERS: gl.constexpr):
    slots = gl.allocate_shared_memory(tensor.dtype, [SLOTS, tensor.block_type.shape[0], tensor.block_type.shape[1]], tensor.layout)
    return Ring(slots, make_barriers(SLOTS, 1), make_barriers(SLOTS, READERS))


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(barriers.index(number), count=ARRIVALS)
    return barriers


@gluon.jit
def find(plan, program, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    head, tile = order.row_tile(program, plan.batch_heads, plan.row_tiles, plan.section)
    start_m = tile * BLOCK_M
    tiles, full = plan.seqlen_k // BLOCK_N, plan.seqlen_k // BLOCK_N
    if CAUSAL:
        first_unseen = start_m + plan.seqlen_k - plan.seqlen_q + 1  # by the first row
        tiles = (first_unseen + BLOCK_M - 1 + BLOCK_N - 1) // BLOCK_N
        full = first_unseen // BLOCK_N
    return Place(head * plan.seqlen_q + start_m, head // GROUP * plan.seqlen_k, start_m, tiles, tiles - full)


@gluon.jit
def produce(rings, q, k, v, plan, programs, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    q_ring, k_ring, v_ring = rings[0], rings[1], rings[2]
    turn, visits = 0, 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        place = find(plan, program, GROUP, BLOCK_M, BLOCK_N, CAUSAL)
        for consumer in gl.static_range(2):
            fill(q_ring, q, consumer, visits, place.row + consumer * (BLOCK_M // 2))
        for tile in range(place.tiles):
            row = place.key + (place.tiles - 1 - tile) * BLOCK_N
            fill_next(k_ring, k, turn, row)
            fill_next(v_ring, v, turn, row)
            turn += 1
        visits += 1  # noqa: SIM113  # Triton has no enumerate


@gluon.jit
def fill_next(ring, tensor, turn, row):
    SLOTS: gl.constexpr = ring.slots.shape[0]
    fill(ring, tensor, turn % SLOTS, turn // SLOTS, row)


@gluon.jit
def fill(ring, tensor, slot, times, row):
    """Fill a slot that was filled so many times before."""
    mbarrier.wait(ring.empty.index(slot), (times & 1) ^ 1)
    mbarrier.expect(ring.full.index(slot), tensor.block_type.nbytes)
    tma.async_copy_global_to_shared(tensor, [row, 0], ring.full.index(slot), ring.slots.index(slot))


@gluon.jit
def await_full(ring, turn, wanted):
    SLOTS: gl.constexpr = ring.slots.shape[0]
    mbarrier.wait(ring.full.index(turn % SLOTS), (turn // SLOTS) & 1, pred=wanted)


@gluon.jit
def release(ring, turn):
    SLOTS: gl.constexpr = ring.slots.shape[0]
    mbarrier.arrive(ring.empty.index(turn % SLOTS), count=1)


@gluon.jit
def first_consumer(
    rings, turns, out, lse, plan, programs, unit, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    consume(0, rings, turns, out, lse, plan, programs, unit, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, PING_PONG)


@gluon.jit
def second_consumer(
    rings, turns, out, lse, plan, programs, unit, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    consume(1, rings, turns, out, lse, plan, programs, unit, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, CAUSAL, PING_PONG)


@gluon.jit
def consume(
    NUMBER: gl.constexpr, rings, turns, out, lse, plan, programs, unit, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    q_ring, k_ring, v_ring = rings[0], rings[1], rings[2]
    q_tile = q_ring.slots.index(NUMBER)
    rows = NUMBER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    turn, visits = 0, 0
    for program in range(gl.program_id(0), programs, gl.num_programs(0)):
        place = find(plan, program, GROUP, BLOCK_M, BLOCK_N, CAUSAL)
        # The last key that each row sees, counted from the first tile visited.
        sight = rows + place.start_m + plan.seqlen_k - plan.seqlen_q - (place.tiles - 1) * BLOCK_N
        mbarrier.wait(q_ring.full.index(NUMBER), visits & 1)
        await_full(k_ring, turn, True)
        products = warpgroup_mma_wait(0, [multiply(q_tile, k_ring, turn, SCORES)])
        release(k_ring, turn)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        p, row_max, row_sum, _ = weigh(products, row_max, gl.zeros_like(row_max), unit, sight, SCORES, CAUSAL)
        weights = as_operand(p, out.dtype, OUT)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        await_full(k_ring, turn + 1, place.tiles > 1)
        for PHASE in gl.static_range(2):
            for tile in range(place.masked if PHASE == 1 and CAUSAL else 1, place.masked if PHASE == 0 else place.tiles):
                if PING_PONG:
                    mbarrier.wait(turns.index(NUMBER), turn - visits & 1)
                products = multiply(q_tile, k_ring, turn + 1, SCORES)
                await_full(v_ring, turn, True)
                acc = warpgroup_mma(weights, v_ring.slots.index(turn % v_ring.slots.shape[0]), acc, is_async=True)
                if PING_PONG:
                    mbarrier.arrive(turns.index(1 - NUMBER), count=1)
                products = warpgroup_mma_wait(1, [products])
                release(k_ring, turn + 1)
                p, row_max, row_sum, rescale = weigh(products, row_max, row_sum, unit, sight + tile * BLOCK_N, SCORES, PHASE == 0)
                following = as_operand(p, out.dtype, OUT)
                # Here and not where it is needed: ptxas moves the wait for acc above every exponential unless a branch is in between.
                await_full(k_ring, turn + 2, tile + 1 < place.tiles)
                acc = warpgroup_mma_wait(0, [acc])
                release(v_ring, turn)
                weights = following
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
                turn += 1
        await_full(v_ring, turn, True)
        acc = warpgroup_mma(weights, v_ring.slots.index(turn % v_ring.slots.shape[0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        release(v_ring, turn)
        turn += 1

        gl.store(lse + place.row + rows, (row_max + gl.log2(row_sum)) * LN_2)
        q_tile.store((acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]).to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [place.row + NUMBER * ROWS, 0], q_tile)
        tma.store_wait(0)
        mbarrier.arrive(q_ring.empty.index(NUMBER), count=1)
        visits += 1  # noqa: SIM113  # Triton has no enumerate


@gluon.jit
def multiply(q_tile, ring, turn, SCORES: gl.constexpr):
    """Issue q k^T."""
    SLOTS: gl.constexpr = ring.slots.shape[0]
    ROWS: gl.constexpr = q_tile.shape[0]
    COLS: gl.constexpr = ring.slots.shape[1]
    zeros = gl.zeros([ROWS, COLS], gl.float32, SCORES)
    return warpgroup_mma(q_tile, ring.slots.index(turn % SLOTS).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(products, row_max, row_sum, unit, sight, SCORES: gl.constexpr, MASKED: gl.constexpr):
    """The weights of a tile and by how much what came before shrinks; unit > 0 is what products are multiplied with, beside log2(e)."""
    if MASKED:
        cols = gl.arange(0, products.shape[1], layout=gl.SliceLayout(0, SCORES))
        products = gl.where(cols[None, :] <= sight[:, None], products, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(products, 1) * unit)
    pivot = new_max
    if MASKED:
        pivot = gl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be nan
    p = gl.exp2(products * unit - pivot[:, None])
    rescale = gl.exp2(row_max - pivot)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def as_operand(p, DTYPE: gl.constexpr, OUT: gl.constexpr):
    """The weights in the registers that a product takes its left operand from."""
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
