"""The simulated GPU deals numbers to lanes as a real one does: so Triton's own layouts say, which need no GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton, whose layouts these are compared with, is not installed")
if not importlib.metadata.version("triton").startswith("3.7."):
    pytest.skip("the layouts of Triton are asked through private functions of 3.7", allow_module_level=True)

from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language import DotOperandLayout, NVMMADistributedLayout, SwizzledSharedLayout

MMA = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])


@pytest.fixture(scope="module")
def builder() -> Iterator[Any]:
    context = ir.context()
    ir.load_dialects(context)
    yield gluon_ir.GluonOpBuilder(context)
    del context  # which a builder needs and does not keep


def place(*parts: tuple[int, list[list[int]]]) -> tuple[int, int]:
    """Each set bit of an index adds its base, by xor."""
    row = column = 0
    for index, bases in parts:
        for bit, base in enumerate(bases):
            if index >> bit & 1:
                row, column = row ^ base[0], column ^ base[1]
    return row, column


@pytest.mark.parametrize(
    ("operand", "bits", "layout", "shape"),
    [
        ("A", 16, DotOperandLayout(0, MMA, 2), [16, 16]),
        ("B", 16, DotOperandLayout(1, MMA, 2), [16, 8]),
        ("A", 32, DotOperandLayout(0, MMA, 1), [16, 8]),
        ("B", 32, DotOperandLayout(1, MMA, 1), [8, 8]),
        ("C", 32, MMA, [16, 8]),
    ],
)
def test_fragments(compiled, builder, operand, bits, layout, shape):
    real = builder.to_linear_layout(layout._to_ir(builder), shape)
    at, count = (ctypes.c_int * 2)(), 1 << len(real.reg_bases)
    assert count * 32 == shape[0] * shape[1]
    for register, lane in itertools.product(range(count), range(32)):
        j, half = divmod(register, 32 // bits)
        compiled.machine.simt_fragment(ctypes.c_char(operand.encode()), bits, lane, j, half, at)
        assert tuple(at) == place((register, real.reg_bases), (lane, real.lane_bases)), (register, lane)


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_the_swizzle_of_tiles(compiled, builder, columns):
    """Chunks of eight, whose number a row changes by xor."""
    layout = SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    real = builder.to_linear_layout(layout._to_ir(builder), [16, columns])
    rows = {place((offset, real.offset_bases)): offset for offset in range(16 * columns)}
    for row, chunk in itertools.product(range(16), range(columns // 8)):
        assert compiled.machine.simt_chunk(columns, row, chunk) == 2 * rows[row, 8 * chunk]
