"""Small kernels, each with one fault that the memory check has to name, and kernels that look odd but have none.

A kernel copies `source`, of SIZE elements, to `target`, BLOCK elements a program, unless its name says otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def clean(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def reads_past_the_end(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at), mask=at < SIZE)


@triton.jit
def reads_before_the_start(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at - 1, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def writes_past_the_end(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at <= SIZE)


@triton.jit
def reads_between_elements(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    halves = (source.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))
    tl.store(target + at, tl.load(halves + at, mask=at < SIZE - 1, other=0.0), mask=at < SIZE)


@triton.jit
def reads_wider_elements(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = source.to(tl.pointer_type(tl.float64))
    tl.store(target + at, tl.load(pairs + at // 2, mask=at < SIZE - 1, other=0.0).to(tl.float32), mask=at < SIZE)


@triton.jit
def uses_an_address_of_nothing(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    nowhere = (at.to(tl.int64) * 4 + 64).to(tl.pointer_type(tl.float32))
    tl.store(target + at, tl.load(nowhere, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def programs_overlap(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def reads_what_a_neighbour_wrote(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)
    neighbour = tl.load(target + at - BLOCK, mask=(at >= BLOCK) & (at < SIZE), other=0.0)
    tl.store(target + at, neighbour, mask=at < SIZE)


@triton.jit
def reads_what_a_neighbour_will_write(zeros, SIZE, BLOCK: tl.constexpr):
    """Each program adds its neighbour's elements to its own, in place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ahead = tl.load(zeros + at + BLOCK, mask=at + BLOCK < SIZE, other=0.0)
    tl.store(zeros + at, ahead, mask=at < SIZE)


@triton.jit
def last_one_writes_what_all_read(zeros):
    first = tl.load(zeros)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(zeros, first)


@triton.jit
def lanes_disagree(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at // 2, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def adds_to_what_was_never_stored(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(target + at, mask=at < SIZE, other=0.0)
    tl.store(target + at, before + tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def adds_atomically_to_what_was_never_stored(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def adds_atomically_past_the_end(source, total, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total + at, tl.load(source + at, mask=at < SIZE, other=0.0))


@triton.jit
def swaps_atomically_past_the_end(counters, SIZE):
    tl.atomic_cas(counters + SIZE, 0, 1)


@triton.jit
def forgets_the_last_element(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE - 1)


@triton.jit
def doubles_its_input(source, target, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < SIZE, other=0.0)
    tl.store(target + at, values, mask=at < SIZE)
    tl.store(source + at, 2 * values, mask=at < SIZE)


@triton.jit
def row_address_in_int32(source, target, row_stride, BLOCK: tl.constexpr):
    """Copies column 0 of a matrix of BLOCK rows."""
    row = tl.arange(0, BLOCK)
    tl.store(target + row, tl.load(source + row * row_stride))


@triton.jit
def row_address_in_int64(source, target, row_stride, BLOCK: tl.constexpr):
    """Copies column 0 of a matrix of BLOCK rows."""
    row = tl.arange(0, BLOCK)
    tl.store(target + row, tl.load(source + row.to(tl.int64) * row_stride))


@triton.jit
def assumes_too_much(source, target, SIZE, BLOCK: tl.constexpr):
    tl.assume(SIZE > 1000)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)


@triton.jit
def sum_without_other(source, target, SIZE, BLOCK: tl.constexpr):
    """One program; target is the sum of source, and its masked lanes count too."""
    at = tl.arange(0, BLOCK)
    tl.store(target, tl.sum(tl.load(source + at, mask=at < SIZE)))


@triton.jit
def order_shows(zeros, target, SIZE, BLOCK: tl.constexpr):
    """target[program]: how many programs ran before."""
    before = tl.atomic_add(zeros, 1)
    tl.store(target + tl.program_id(0), before)


@triton.jit
def transposes(source, target, rows, cols, view, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A clean kernel of two axes; source is a matrix of any strides, given with them as a tuple."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    values = tl.load(view[0] + row * view[1] + col * view[2], mask=inside, other=0.0)
    tl.store(target + col * rows + row, values, mask=inside)


@triton.jit
def reads_its_own_writes(source, target, SIZE, BLOCK: tl.constexpr):
    """A clean kernel: target holds source, then twice source."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < SIZE, other=0.0), mask=at < SIZE)
    again = tl.load(target + at, mask=at < SIZE, other=0.0)
    tl.store(target + at, again + again, mask=at < SIZE)


@triton.jit
def lanes_agree(source, target, SIZE, BLOCK: tl.constexpr):
    """A clean kernel: all lanes store the same value to one element."""
    at = tl.arange(0, BLOCK)
    tl.store(target + tl.program_id(0) + at * 0, tl.load(source + at * 0))
