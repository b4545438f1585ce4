"""The PTX of each primitive of csrc/cuda/prims.cuh, which the simulated GPU can't show: the instruction, and the order of its operands.

in[i] and out[i] are words of memory, %1 and so on what an instruction defines. Source: PTX ISA, "Asynchronous Warpgroup and Warp Level
Matrix Instructions", "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="cuda_code.py names its disassembler")

from . import cuda_code

HERE = Path(__file__).parent
# d (16x8) = a (16x16) b (16x8) + c, of tf32 a (16x8) b (8x8): d and c are words 6 to 9, a 0 to 3, b 4 and 5.
C = "{in[6],in[7],in[8],in[9]}"
OPERANDS = f"{C},{{in[0],in[1],in[2],in[3]}},{{in[4],in[5]}},{C}"
MULTIPLIED = ["out[0] = in[6]", "out[1] = in[7]", "out[2] = in[8]", "out[3] = in[9]"]
FOUR = ["out[0] = %1", "out[1] = %2", "out[2] = %3", "out[3] = %4"]
EXPECTED = {
    # 16 bytes through the second level of the cache alone, of which a number is read and the rest is 0.
    "copy16": ["cp.async.cg.shared.global.L2::128B [tile], [in], 16, in[0]"],
    "commit_copies": ["cp.async.commit_group"],
    "wait_for_all_copies": ["cp.async.wait_group 0"],
    "wait_for_all_but_one": ["cp.async.wait_group 1"],
    "load_matrices": ["ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%1,%2,%3,%4}, [tile]", *FOUR],
    "load_matrices_transposed": ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%1,%2,%3,%4}, [tile]", *FOUR],
    "multiply_bfloat16": [f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {OPERANDS}", *MULTIPLIED],
    "multiply_float32": [f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {OPERANDS}", *MULTIPLIED],
    "multiply_float16": [f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {OPERANDS}", *MULTIPLIED],
    "leading": ["cvt.rna.tf32.f32 %1,in[0]", "out[0] = %1"],
    # The first source becomes the upper half.
    "pack_bfloat16": ["cvt.rn.bf16x2.f32 %1,in[1],in[0]", "out[0] = %1"],
    "pack_float16": ["cvt.rn.f16x2.f32 %1,in[1],in[0]", "out[0] = %1"],
    "widen_float16": ["cvt.f32.f16 %1,in[0]", "out[0] = %1"],
    "power_of_2": ["ex2.approx.ftz.f32 %1,in[0]", "out[0] = %1"],
    "multiply_high": ["mul.hi.u32 %1, in[0], in[1]", "out[0] = %1"],
    "shuffle_xor": ["shfl.sync.bfly.b32 %1|%2, in[0], 2, 31, -1", "out[0] = %1"],
    "sync_warp": ["bar.warp.sync -1"],
    "sync_block": ["bar.sync 0"],
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    absent = cuda_code.missing()
    if absent:
        pytest.skip(absent)
    target = tmp_path_factory.mktemp("ptx") / "primitives.ptx"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-arch=compute_80",
        "-ptx",
        f"-I{cuda_code.ROOT / 'csrc'}",
        HERE / "primitives.cu",
        "-o",
        target,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return read(target.read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_primitive_is_the_instruction_it_says(name: str, kernels: dict[str, list[str]]) -> None:
    assert kernels[name] == EXPECTED[name]


def test_every_line_of_ptx_in_the_sources_is_among_them(kernels: dict[str, list[str]]) -> None:
    """And prims.cuh is the only file that has any."""
    with_ptx = [path.name for path in (cuda_code.ROOT / "csrc" / "cuda").iterdir() if re.search(r"\basm\b", path.read_text())]
    assert with_ptx == ["prims.cuh"]
    text = (cuda_code.ROOT / "csrc" / "cuda" / "prims.cuh").read_text()
    shown = [line for lines in kernels.values() for line in lines]
    for written in re.findall(r'\basm(?: volatile)?\(\s*"([\w.:]+)', text):
        assert any(line.startswith(written) for line in shown), written
    assert set(kernels) == set(EXPECTED)


def read(ptx: str) -> dict[str, list[str]]:
    """Of each kernel the instructions that are not there to read its arguments, with words of memory in place of registers."""
    return {name: instructions(body) for name, body in re.findall(r"\.entry (\w+)\(.*?\)\s*\{(.*?)\n\}", ptx, re.DOTALL)}


def instructions(body: str) -> list[str]:
    names: dict[str, str] = {}
    found: list[str] = []

    def named(text: str) -> str:
        return re.sub(r"%[a-z]+\d+", lambda register: names.setdefault(register[0], f"%{fresh(names)}"), text)

    def word(address: str, offset: str | None) -> str:
        return f"{named(address)}[{int(offset or 0) // 4}]"

    for line in (line.strip().rstrip(";") for line in body.splitlines()):
        if not line or line.startswith(("//", ".reg", "ret")):
            continue
        if argument := re.fullmatch(r"ld\.param\.u64\s+(\S+), \[\w+_param_(\d)\]", line):
            names[argument[1]] = ("in", "out")[int(argument[2])]
        elif copy := re.fullmatch(r"(?:cvta\.to\.global\.u64|mov\.u32|mov\.b32)\s+(\S+), (\S+)", line):
            names[copy[1]] = named(copy[2])
        elif load := re.fullmatch(r"ld\.global(?:\.nc)?\.\w+\s+(\S+), \[([^]+]+)(?:\+(\d+))?\]", line):
            names[load[1]] = word(load[2], load[3])
        elif store := re.fullmatch(r"st\.global\.\w+\s+\[([^]+]+)(?:\+(\d+))?\], (\S+)", line):
            found.append(f"{word(store[1], store[2])} = {named(store[3])}")
        else:
            found.append(re.sub(r"\s+", " ", named(line)))
    return found


def fresh(names: dict[str, str]) -> int:
    return 1 + sum(name.startswith("%") for name in names.values())
