"""What one turn of a kernel's main loops asks of each unit of an SM of sm_90, read from the machine code.

cycles of a unit = instructions of a warp * lanes / lanes the unit takes a cycle        (a quarter of an SM; of shared memory the whole)

Throughput: NVIDIA, "CUDA C++ programming guide", arithmetic instructions of compute capability 9.0, a quarter of an SM each. A product of
64xNx16 keeps the four tensor cores busy for N / 2 cycles, which is the published peak of 989 TFLOP/s at 1830 MHz on 132 SMs. Shared
memory passes 128 bytes a cycle to an SM: of a product its right operand, N rows of 16, and the left one unless registers hold it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16")
SHARED_BYTES = 128  # a cycle
# Cycles a warp's instruction takes of a unit that serves a quarter of an SM.
FMA_UNIT = {"FADD": 1, "FMUL": 1, "FFMA": 1, "IMAD": 2}
MUFU = 8
SHUFFLE = 4
# Bytes of shared memory a warp reads or writes, by the last part of the name; 4 a lane where there is none.
WIDTHS = {"64": 256, "128": 512, "2": 256, "4": 512, "U8": 128, "U16": 128}
SHARED_ACCESS = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
# What occupies no arithmetic unit: control, barriers, memory, and the uniform datapath, which is a unit of its own.
ISSUE_ONLY = re.compile(
    r"^(U|BRA|BAR|BSSY|BSYNC|EXIT|NOP|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|FENCE|ERRBAR|CCTL|DEPBAR|LDGDEPBAR|LDG|LDGSTS|STG|LDL|STL"
    r"|LDC|S2R|CS2R|S2UR|R2UR|ELECT|VOTE|YIELD|NANOSLEEP|CALL|RET|ACQBULK|SETMAXREG|USETMAXREG|HGMMA)"
)


class Mix(NamedTuple):
    """Cycles that one turn of a loop takes of each unit, for each of its warps."""

    tensor: int = 0
    shared: int = 0  # without the asynchronous copies, which are no instructions of the warps that wait for them
    mufu: int = 0
    fma: int = 0
    alu: int = 0
    issue: int = 0


class Block(NamedTuple):
    """Instructions that follow each other, as (guard, name, operands), with the blocks that may come next."""

    instructions: list[tuple[str, str, str]]
    next: list[int]


def mixes(code: str) -> list[Mix]:
    """Of every innermost loop around tensor-core products, in the order of the code."""
    return [mix(loop) for loop in product_loops(code)]


def mix(instructions: list[tuple[str, str, str]]) -> Mix:
    total = Mix()
    for _, name, operands in instructions:
        total = Mix(*map(sum, zip(total, cycles(name, operands), strict=True)))
    return total


def cycles(name: str, operands: str) -> Mix:
    base, product = name.partition(".")[0], PRODUCT.match(name)
    if product is not None:
        columns = int(product[1])
        left = 0 if re.match(r"\s*R\d+, R\d+", operands) else 64
        return Mix(tensor=columns // 2, shared=(left + columns) * 16 * 2 // SHARED_BYTES, issue=1)
    if base == "MUFU":
        return Mix(mufu=MUFU, issue=1)
    if base in FMA_UNIT:
        return Mix(fma=FMA_UNIT[base], issue=1)
    if base in ("SHFL", "REDUX"):
        return Mix(shared=SHUFFLE, issue=1)
    if base in SHARED_ACCESS:
        # Each of the four quarters sends a warp.
        return Mix(shared=4 * WIDTHS.get(name.rpartition(".")[2], 128) // SHARED_BYTES, issue=1)
    return Mix(issue=1) if ISSUE_ONLY.match(name) else Mix(alu=2, issue=1)


def covered(instructions: list[tuple[str, str, str]]) -> tuple[int, int]:
    """How many exponentials of a turn stand beside a product that is still under way, and of how many."""
    flying, begun = 0, False  # groups of products, and whether one more has begun
    for _ in range(2):  # the first turn shows what is under way when the second begins
        beside = every = 0
        for _, name, operands in instructions:
            if name.startswith("HGMMA"):
                begun = "gsb0" not in operands
                flying += not begun
            elif name.startswith("WARPGROUP.DEPBAR"):
                flying = min(flying, int(operands.split(",")[1], 16))
            elif name == "MUFU.EX2":
                every, beside = every + 1, beside + (flying > 0 or begun)
    return beside, every


def product_loops(code: str) -> list[list[tuple[str, str, str]]]:
    """The instructions of the loops that hold wgmma products and no smaller such loop."""
    blocks = split(code)
    bodies = [
        body
        for body in natural_loops(blocks).values()
        if any(name.startswith("HGMMA") for block in body for _, name, _ in blocks[block].instructions)
    ]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    return [[each for block in sorted(body) for each in blocks[block].instructions] for body in sorted(innermost, key=min)]


def split(code: str) -> list[Block]:
    """The code in blocks: one begins at each label and after each branch."""
    blocks, labels, targets = [Block([], [])], {}, []
    for line in code.splitlines():
        label, found = LABEL.match(line), INSTRUCTION.match(line)
        if label is not None:
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            labels[label[1]] = len(blocks) - 1
        elif found is not None:
            guard, name, operands = found["guard"] or "", found["name"], found["operands"]
            blocks[-1].instructions.append((guard, name, operands))
            if name.startswith(("BRA", "EXIT", "RET", "BRX")):
                targets += [(len(blocks) - 1, target) for target in re.findall(r"\.L_x_\d+", operands)]
                blocks.append(Block([], []))
    for number, block in enumerate(blocks[:-1]):
        guard, name, operands = block.instructions[-1] if block.instructions else ("", "", "")
        conditional = bool(guard) or re.match(r"\s*!?U?P\d", operands) is not None
        if conditional or not name.startswith(("BRA", "EXIT", "RET", "BRX")):
            block.next.append(number + 1)
    for number, target in targets:
        blocks[number].next.append(labels[target])
    return blocks


def natural_loops(blocks: list[Block]) -> dict[int, set[int]]:
    """By its first block, each loop: what reaches a jump back without passing that block, which comes before all of it on every way."""
    before = predecessors(blocks)
    dominators = dominating(before)
    loops: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for head in block.next:
            if head in dominators[number]:
                loops.setdefault(head, {head}).update(reaching(number, head, before))
    return loops


def predecessors(blocks: list[Block]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for following in block.next:
            before[following].append(number)
    return before


def dominating(before: list[list[int]]) -> list[set[int]]:
    """The blocks that every way to a block passes."""
    every = set(range(len(before)))
    found = [set(every) if before[number] and number else {number} for number in range(len(before))]
    changed = True
    while changed:
        changed = False
        for number, froms in enumerate(before):
            if froms and number:
                now = {number} | set.intersection(*(found[each] for each in froms))
                changed |= now != found[number]
                found[number] = now
    return found


def reaching(number: int, head: int, before: list[list[int]]) -> Iterator[int]:
    seen, waiting = {head}, [number]
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen.add(block)
            yield block
            waiting += before[block]
