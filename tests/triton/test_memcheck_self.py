"""The memory check is checked: each planted fault is found and named by its kind, kernel and line, and legal kernels pass."""

from __future__ import annotations

import inspect
import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from . import faulty_kernels as kernels
from .far_apart import far_apart
from .memcheck import MemcheckError, memcheck

SIZE, BLOCK = 21, 8
GRID = (3,)

# A fault that shows in a copy of SIZE elements: the name of its kernel and of its kind.
COPIES = {
    "reads_past_the_end": "out of bounds",
    "reads_before_the_start": "out of bounds",
    "writes_past_the_end": "out of bounds",
    "uses_an_address_of_nothing": "out of bounds",
    "reads_between_elements": "misaligned",
    "reads_wider_elements": "misaligned",
    "programs_overlap": "race",
    "reads_what_a_neighbour_wrote": "race",
    "lanes_disagree": "race",
    "adds_to_what_was_never_stored": "uninitialised read",
    "adds_atomically_to_what_was_never_stored": "uninitialised read",
    "forgets_the_last_element": "unwritten result",
    "doubles_its_input": "write to an input",
    "assumes_too_much": "failed assertion",
}


def numbers(size: int = SIZE) -> torch.Tensor:
    return torch.arange(1.0, size + 1)


def copy(kernel, source: torch.Tensor, shuffle: int | None = None) -> torch.Tensor:
    with memcheck(shuffle) as check:
        target = torch.empty(SIZE)
        kernel[GRID](source, target, SIZE, BLOCK)
        check.results(target)
    return target


@pytest.mark.parametrize("name", COPIES)
def test_a_planted_fault_is_named(name):
    kernel, source = getattr(kernels, name), numbers()
    with pytest.raises(MemcheckError) as caught:
        copy(kernel, source)
    assert COPIES[name] in caught.value.kinds
    if name == "forgets_the_last_element":
        assert "1 of 21 elements" in str(caught.value)
        return
    assert set(caught.value.kinds) <= {COPIES[name], "unwritten result"}
    sentence = str(caught.value).splitlines()[0]
    lines, first = inspect.getsourcelines(kernel.fn)
    number = int(re.search(rf"{name}, program \(\d+, 0, 0\) of \(3, 1, 1\), faulty_kernels\.py:(\d+): ", sentence)[1])
    assert first <= number < first + len(lines)
    assert torch.equal(source, numbers()), "a faulty access must not be carried out"


def test_the_sentence_says_what_and_where():
    with pytest.raises(MemcheckError) as caught:
        copy(kernels.reads_past_the_end, numbers())
    line = inspect.getsourcelines(kernels.reads_past_the_end.fn)[1] + 3
    assert str(caught.value) == (
        f"out of bounds: reads_past_the_end, program (2, 0, 0) of (3, 1, 1), faulty_kernels.py:{line}: "
        "loads 3 elements outside source of shape (21,) and strides (1,), one of them number 21"
    )


def test_a_race_with_a_later_write_is_named():
    """The interpreter runs the programs in order, so that nothing but the check can notice this one."""
    with pytest.raises(MemcheckError) as caught, memcheck():
        kernels.reads_what_a_neighbour_will_write[GRID](torch.zeros(SIZE), SIZE, BLOCK)
    assert caught.value.kinds == ["race"]
    with pytest.raises(MemcheckError) as caught, memcheck():
        kernels.last_one_writes_what_all_read[GRID](torch.zeros(SIZE))
    assert caught.value.kinds == ["race"]


def test_an_access_outside_the_view_but_inside_its_storage_is_named():
    with pytest.raises(MemcheckError, match=r"out of bounds: clean, .* outside source of shape \(20,\)"):
        copy(kernels.clean, numbers(40)[:20])
    with pytest.raises(MemcheckError, match=r"out of bounds: clean, .* strides \(2,\), one of them number 1"):
        copy(kernels.clean, numbers(42)[::2])
    with pytest.raises(MemcheckError, match=r"out of bounds: clean, .* strides \(8388608,\), one of them number 1"):
        copy(kernels.clean, torch.zeros(1 << 26)[:: 1 << 23])


def test_an_access_that_lands_in_another_argument_is_named():
    """Two arguments that touch: the address past the end of one is legal for the other."""
    both = numbers(2 * SIZE)
    with pytest.raises(MemcheckError, match=r"out of bounds: transposes, .* loads 3 elements outside view\.0 of shape \(21,\)"), memcheck():
        kernels.transposes[(1,)](both[SIZE:], torch.empty(6, 4), 4, 6, (both[:SIZE], 6, 1), 4, 8)


def test_an_atomic_operation_is_checked():
    with pytest.raises(MemcheckError) as caught, memcheck():
        kernels.adds_atomically_past_the_end[GRID](torch.zeros(24), torch.zeros(SIZE), SIZE, BLOCK)
    assert caught.value.kinds == ["out of bounds"]
    with pytest.raises(MemcheckError) as caught, memcheck():
        kernels.swaps_atomically_past_the_end[(1,)](torch.zeros(4, dtype=torch.int32), 4)
    assert caught.value.kinds == ["out of bounds"]


def test_an_address_in_int32_is_named():
    matrix = far_apart(numbers(4)[:, None], 0)
    with memcheck() as check:
        target = torch.empty(4)
        kernels.row_address_in_int64[(1,)](matrix, target, matrix.stride(0), 4)
        check.results(target)
    assert target.tolist() == [1, 2, 3, 4]
    with pytest.raises(MemcheckError, match=r"integer overflow: row_address_in_int32, .* int32 overflow .* operation mul"), memcheck():
        kernels.row_address_in_int32[(1,)](matrix, torch.empty(4), matrix.stride(0), 4)


def test_a_masked_lane_without_other_holds_poison():
    target = torch.empty(1)
    kernels.sum_without_other[(1,)](numbers(), target, SIZE, 32)
    assert target.item() == numbers().sum(), "the interpreter no longer hides the fault: poison may go"
    with memcheck():
        target = torch.empty(1)
        kernels.sum_without_other[(1,)](numbers(), target, SIZE, 32)
    assert target.isnan().all()


def test_a_dependence_on_the_order_of_programs_shows():
    def run(shuffle: int | None) -> list[int]:
        with memcheck(shuffle) as check:
            zeros, target = torch.zeros(1, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
            kernels.order_shows[(8,)](zeros, target, 8, 1)
            check.results(target)
        return target.tolist()

    assert run(None) == list(range(8))
    assert run(0) != run(None)
    assert run(0) == run(0) != run(1)
    assert sorted(run(0)) == run(None)


@pytest.mark.parametrize("shuffle", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_clean_kernel_has_no_fault(dtype, shuffle):
    source = numbers().to(dtype)
    with memcheck(shuffle) as check:
        target = torch.empty_like(source)
        kernels.clean[GRID](source, target, SIZE, BLOCK)
        check.results(target)
    assert torch.equal(target, source)


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "repeated rows", "overlapping", "part", "far apart"])
def test_any_strides_are_legal(layout):
    base = torch.randn(1 << 12)
    source = {
        "dense": base[:24].view(4, 6),
        "transposed": base[:24].view(6, 4).t(),
        "strided": base.as_strided((4, 6), (31, 5), 7),
        "repeated rows": base[:6].expand(4, 6),
        "overlapping": base.as_strided((4, 6), (1, 2)),
        "part": base[:48].view(6, 8)[1:5, 1:7],
        "far apart": torch.empty(1 << 27, dtype=torch.int8).view(torch.float32).as_strided((4, 6), (1 << 23, 3)).copy_(base[:6]),
    }[layout]
    with memcheck() as check:
        target = torch.empty(6, 4)
        kernels.transposes[(1,)](source, target, 4, 6, (source, *source.stride()), 4, 8)
        check.results(target.view(2, 12)[:, ::3], target)
    assert torch.equal(target, source.t())


def test_two_views_of_one_buffer_are_legal():
    with memcheck() as check:
        both = torch.empty(2, SIZE)
        kernels.clean[GRID](numbers(), both[0], SIZE, BLOCK)
        kernels.clean[GRID](both[0], both[1], SIZE, BLOCK)
        check.results(both)
    assert torch.equal(both, numbers().expand(2, SIZE))


def test_half_a_buffer_is_not_a_whole_result():
    def half() -> None:
        with memcheck() as check:
            both = torch.empty(2, SIZE)
            kernels.clean[GRID](numbers(), both[0], SIZE, BLOCK)
            check.results(both[0])
            check.results(both, both[1], both[0])

    with pytest.raises(MemcheckError) as caught:
        half()
    assert str(caught.value).splitlines() == [
        "unwritten result: result 0 of shape (2, 21): 21 of 42 elements were never stored to",
        "unwritten result: result 1 of shape (21,): 21 of 21 elements were never stored to",
    ]


def test_a_program_may_read_its_own_writes():
    assert torch.equal(copy(kernels.reads_its_own_writes, numbers()), 2 * numbers())


def test_lanes_may_agree():
    with memcheck() as check:
        target = torch.empty(3)
        kernels.lanes_agree[GRID](numbers(), target, SIZE, BLOCK)
        check.results(target)
    assert target.tolist() == [1, 1, 1]


def test_torch_may_fill_an_empty_tensor():
    def run(filled: int) -> None:
        with memcheck() as check:
            source, target = numbers().new_empty(SIZE), torch.empty_strided((SIZE,), (1,))
            source[:filled] = 0.5
            kernels.clean[GRID](source, target, SIZE, BLOCK)
            check.results(target.neg_())

    run(SIZE)
    with pytest.raises(MemcheckError, match=r"uninitialised read: .* loads 5 elements of source "):
        run(SIZE - 5)


def test_what_torch_makes_under_the_check_is_no_input():
    source = numbers()
    with memcheck() as check:
        made = -source
        kernels.doubles_its_input[GRID](made, torch.empty(SIZE), SIZE, BLOCK)
        check.results(made)
    assert torch.equal(made, -2 * source)


def test_launches_may_follow_each_other_on_one_buffer():
    """Only programs of the same launch can race."""
    with memcheck() as check:
        first, second = torch.zeros(SIZE), torch.empty(SIZE)
        kernels.clean[GRID](numbers(), first, SIZE, BLOCK)
        kernels.clean[GRID](first, second, SIZE, BLOCK)
        kernels.clean[(1,)](second, first, SIZE, 32)
        check.results(second)
    assert torch.equal(first, numbers())


def test_empty_tensors_are_legal():
    with memcheck() as check:
        source, target = torch.empty(0), torch.empty(0)
        kernels.clean[(1,)](source, target, 0, BLOCK)
        check.results(target)


def test_every_fault_of_a_block_is_reported_once_at_its_end():
    source = numbers()

    def run() -> None:
        with memcheck():
            target = torch.empty(SIZE)
            kernels.reads_past_the_end[GRID](source, target, SIZE, BLOCK)
            kernels.doubles_its_input[GRID](source, target, SIZE, BLOCK)
            kernels.reads_past_the_end[GRID](source, target, SIZE, BLOCK)

    with pytest.raises(MemcheckError) as caught:
        run()
    assert caught.value.kinds == ["out of bounds", "write to an input"]


def test_an_exception_of_the_block_does_not_hide_faults():
    def run(kernel) -> None:
        with memcheck():
            kernel[GRID](numbers(), torch.empty(SIZE), SIZE, BLOCK)
            raise ValueError("of the block")

    with pytest.raises(MemcheckError, match="out of bounds"):
        run(kernels.reads_past_the_end)
    with pytest.raises(ValueError, match="of the block"):
        run(kernels.clean)


def test_the_interpreter_is_left_as_it_was():
    before = torch.empty, torch.Tensor.new_empty
    with pytest.raises(MemcheckError):
        copy(kernels.doubles_its_input, numbers())
    assert (torch.empty, torch.Tensor.new_empty) == before
    assert "new_empty" not in vars(torch.Tensor)
    source, target = numbers(), torch.zeros(SIZE)
    kernels.doubles_its_input[GRID](source, target, SIZE, BLOCK)
    assert torch.equal(source, 2 * numbers())
