"""The attention kernels under the memory check: every access legal, every result written, no dependence on the order of programs.

What tensors of integers hold is nobody's promise, and neither are small strides: both are taken to their ends here.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels import decode

from fused_attention.testing import CASES, Case, Inputs

from .far_apart import far_apart
from .memcheck import MemcheckError, memcheck

# Two options at a time add no access that neither has; of the rest every third, and whatever mixes many.
SINGLE = [case for case in CASES if "+" not in case.name and case.seqlen_q * case.seqlen_k < 2000 and case.heads < 10]
FORWARD = [case for number, case in enumerate(SINGLE) if number % 3 == 0 or "everything" in case.name]
FEW_QUERIES = [case for case in SINGLE if case.lengths_q is None and case.seqlen_q * case.heads // (case.kv_heads or case.heads) <= 64]
DECODE = [case for number, case in enumerate(FEW_QUERIES) if number % 4 == 1 or case.name in ("everything", "decode", "one-query")]
DECODE.append(Case("late-range", heads=1, seqlen_q=2, seqlen_k=150, kv_lengths=((140, 150), (0, 150)), mask="b11k"))  # splits past all keys


@pytest.fixture(params=["forward", "decode"])
def path(request, monkeypatch):
    return take(request.param, monkeypatch)


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels compute a forward, whatever the number of queries; decode in splits of one tile each."""
    monkeypatch.setattr(decode, "suits", lambda *_: path == "decode")
    monkeypatch.setattr(decode, "SPLIT", 16)
    return path


def same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def run_checked(inputs: Inputs, shuffle: int | None = None, backward: bool = True) -> dict[str, torch.Tensor]:
    with memcheck(shuffle) as check:
        result = inputs.run("triton", backward=backward)
        check.results(*result.values())
    return result


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_programs_keep_to_their_memory_in_any_order(case, monkeypatch):
    """Against a run without the check, whose masked lanes hold zeros and whose programs run in order."""
    take("forward", monkeypatch)
    inputs = case.make()
    same_bits(run_checked(inputs, shuffle=0), inputs.run("triton"))


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_programs_that_split_the_keys_keep_to_their_memory_in_any_order(case, monkeypatch):
    take("decode", monkeypatch)
    inputs = case.make()
    same_bits(run_checked(inputs, shuffle=1, backward=False), inputs.run("triton", backward=False))


def faults(inputs: Inputs) -> list[str]:
    try:
        run_checked(inputs)
    except MemcheckError as error:
        return str(error).splitlines()
    return []


def hostile(random: np.random.Generator, columns: tuple[int, ...], dtype: torch.dtype, legal: int) -> torch.Tensor:
    """A row for each end of the type, of int32, and of what is legal, in any order."""
    info = torch.iinfo(dtype)
    edges = {info.min, info.min + 1, -(2**31), -(2**31) + legal, -legal, -1, 0, 1, legal - 1, legal, legal + 1}
    edges |= {2**31 - 1 - legal, 2**31 - 1, info.max - 1, info.max}
    rows = sorted(edges | set(range(2, 2 + 15 - len(edges))))
    return torch.from_numpy(np.stack([random.permutation(rows) for _ in range(math.prod(columns))], -1)).to(dtype).view(15, *columns)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(torch.int32, (3, 2)), (torch.int64, (3, 2)), (torch.int32, (None, 0)), (torch.int64, (2**62, None)), (torch.int64, None)],
    ids=str,
)
def test_hostile_lengths_and_offsets_lead_nowhere(dtype, window, path):
    random = np.random.default_rng(0)
    inputs = Case("hostile", batch=15, heads=1, seqlen_q=17, seqlen_k=35, alibi_slopes="h").make()
    backward = path == "forward"
    options = {"offset": hostile(random, (), dtype, 35), "window": window}
    run_checked(inputs.changed(options=options), backward=backward)
    options["kv_lengths"] = hostile(random, (2,) if window else (), dtype, 35)
    run_checked(inputs.changed(options=options), backward=backward)


@pytest.mark.parametrize("seed", range(6))
def test_hostile_members_lead_nowhere(seed):
    """Members may overlap, so that programs write the same rows; but these are rows of out."""
    random = np.random.default_rng(seed)
    dtype = torch.int32 if seed % 2 else torch.int64
    inputs = Case("hostile", heads=1, lengths_q=(9, 0, 20, 3) + (0,) * 10, lengths_k=(7, 19, 1, 6) + (0,) * 10, causal=seed % 3 == 0).make()
    options = {"cu_seqlens_q": hostile(random, (), dtype, 32), "cu_seqlens_k": hostile(random, (), dtype, 33)}
    if seed > 2:
        options |= {"kv_lengths": hostile(random, (), dtype, 20)[1:], "offset": hostile(random, (), dtype, 20)[1:]}
    assert not [fault for fault in faults(inputs.changed(options=options)) if not fault.startswith("race:")]


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "head", "seq", "dim"])
def test_strides_of_a_billion_elements_do_not_overflow(axis, path):
    case = Case("near", batch=3, heads=3, seqlen_q=3, seqlen_k=4, head_dim=3, causal=True, bias="bhqk", mask="bhqk")
    near = case.make(dtype=torch.float16)
    options = {name: near.options[name] for name in ("bias", "mask")}
    far = near.changed(
        q=far_apart(near.q, axis),
        k=far_apart(near.k, axis),
        v=far_apart(near.v, axis),
        dout=far_apart(near.dout, axis),
        options={name: far_apart(tensor, axis) for name, tensor in options.items()},
    )
    assert max(far.q.stride()) * 2 == 2**31, "the last of three must lie beyond int32"
    backward = path == "forward"
    same_bits(run_checked(far, backward=backward), near.run("triton", backward=backward))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_packed_rows_do_not_overflow(axis):
    near = Case("near", heads=5, lengths_q=(3, 5), head_dim=5, causal=True).make(dtype=torch.float16)
    far = near.changed(**{name: far_apart(getattr(near, name), axis) for name in ("q", "k", "v", "dout")})
    same_bits(run_checked(far), near.run("triton"))


def test_strides_of_lengths_do_not_overflow():
    near = Case("near", batch=5, kv_lengths=((0, 9), (1, 8), (2, 7), (3, 6), (4, 5)), offset=(1, 2, 3, 4, 5), window=(3, 3)).make()
    options = {name: far_apart(near.options[name], 0) for name in ("kv_lengths", "offset")}
    same_bits(run_checked(near.changed(options=options)), near.run("triton"))
