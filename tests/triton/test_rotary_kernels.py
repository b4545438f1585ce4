"""The rotary kernel against a turn of complex numbers in float64, with a bound from the number of roundings."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton interprets kernels only where TRITON_INTERPRET=1 was set before its import", allow_module_level=True)

from fused_attention.triton_kernels.rotary import rotate

from .memcheck import memcheck
from .rounding import DTYPES, normal, unit, within

TABLE = 50
SIZES = [(64, 64), (1, 0), (2, 2), (3, 2), (63, 62), (65, 32), (80, 40), (257, 256), (260, 6)]  # head_dim, rotary_dim


class Tables(NamedTuple):
    """cos and sin of (position, pair)."""

    cos: Tensor
    sin: Tensor


def tables(rotary_dim: int, dtype: torch.dtype = torch.float32, length: int = TABLE) -> Tables:
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(1, rotary_dim // 2 + 1)
    return Tables(angles.cos().to(dtype), angles.sin().to(dtype))


def heads(head_dim: int, dtype: torch.dtype = torch.float32, seqlen: int = 37) -> Tensor:
    """(2, 3, seqlen, head_dim), as a projection leaves it: not contiguous."""
    return normal(2, seqlen, 3, head_dim, seed=0, dtype=dtype).transpose(1, 2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | int, interleaved: bool, inverse: bool) -> Tensor:
    """The definition: each pair is a complex number, times cos + i sin of its position."""
    (batch, _, seqlen, _), pairs = x.shape, cos.shape[1]
    where = positions if isinstance(positions, Tensor) else positions + torch.arange(seqlen)
    where = where.expand(batch, seqlen).long().clamp(0, len(cos) - 1)
    turn = torch.complex(cos.double(), -sin.double() if inverse else sin.double())[where]
    rotary, rest = x.double()[..., : 2 * pairs], x.double()[..., 2 * pairs :]
    axis = -1 if interleaved else -2
    a, b = rotary.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(axis)
    out = torch.complex(a, b) * turn[:, None]
    return torch.cat([torch.stack([out.real, out.imag], axis).flatten(-2), rest], -1)


def verify(x: Tensor, table: Tables, positions: Tensor | int = 0, interleaved: bool = False, inverse: bool = False) -> Tensor:
    out = rotate(x, *table, positions=positions, interleaved=interleaved, inverse=inverse)
    # Two products and a sum of them; |x_a cos| + |x_b sin| is what the turn of the magnitudes gives, but for the sign of sin.
    size = turned(x.abs(), *(t.abs() for t in table), positions, interleaved, inverse=False).abs()
    size = size.maximum(turned(x.abs(), *(t.abs() for t in table), positions, interleaved, inverse=True).abs())
    size[..., 2 * table.cos.shape[1] :] = 0.0
    within("out", out, turned(x, *table, positions, interleaved, inverse), 3 * unit(x.dtype) * size)
    assert out.stride() == torch.empty_like(x).stride()
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), SIZES)
def test_every_size_and_dtype(head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    verify(heads(head_dim, dtype), tables(rotary_dim, dtype), 5, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse(interleaved: bool) -> None:
    verify(heads(65), tables(32), 5, interleaved, inverse=True)


def test_tables_finer_than_the_rows() -> None:
    verify(heads(64, torch.float16), tables(64, torch.float32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_of_every_row(interleaved: bool, dtype: torch.dtype) -> None:
    """Also where they repeat, fall, or are one sequence's for all; strided, as in a padded batch."""
    positions = torch.randint(0, TABLE, (37, 2), generator=torch.Generator().manual_seed(3)).to(dtype).T
    for given in (positions, positions[:1], positions[0], positions[:, :1]):
        verify(heads(65), tables(32), given, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_hostile_positions_stay_in_the_table(interleaved: bool) -> None:
    largest = 2**63 - 1
    rows = torch.tensor([[0, 49, 50, -1, 2**31, 2**32 + 3, -(2**31) - 5, largest, -largest - 1]]).expand(2, 9)
    x, table = heads(65, seqlen=9), tables(32)
    with memcheck() as check:
        out = rotate(x, *table, positions=rows, interleaved=interleaved)
        check.results(out)
    assert torch.equal(out, verify(x, table, rows, interleaved))
    for offset in (-3, 45, 2**31 - 2, 2**31, -(2**31) - 1, 2**40, -(2**62)):
        with memcheck():
            verify(x, table, offset, interleaved)


def test_offsets_equal_positions_and_inverse_undoes() -> None:
    x, table = heads(65, torch.float64), tables(32, torch.float64)
    out = rotate(x, *table, positions=7)
    assert torch.equal(out, rotate(x, *table, positions=torch.arange(7, 44)))
    torch.testing.assert_close(rotate(out, *table, positions=7, inverse=True), x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_inverse_is_the_gradient(interleaved: bool) -> None:
    x, table, dout = heads(65, torch.float64), tables(32, torch.float64), normal(2, 3, 37, 65, seed=9, dtype=torch.float64)
    exact = x.clone().requires_grad_()
    turned(exact, *table, 3, interleaved, inverse=False).backward(dout)
    got = rotate(dout, *table, positions=3, interleaved=interleaved, inverse=True)
    within("dx", got, exact.grad, 8 * unit(torch.float64) * dout.abs().amax(-1, keepdim=True).expand_as(dout))


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides(interleaved: bool) -> None:
    """Transposed, expanded and cut rows, and transposed tables: the bits of their contiguous copies."""
    table = tables(32)
    for x in (
        heads(37, seqlen=65).mT,
        heads(65)[:, :1].expand(2, 3, 37, 65),
        torch.cat([heads(65)] * 2, -1)[..., 3:68],
        heads(65)[:, :, ::2],
    ):
        want = rotate(x.contiguous(), *table, interleaved=interleaved)
        assert torch.equal(verify(x, Tables(*(t.T.contiguous().T for t in table)), interleaved=interleaved), want)


@pytest.mark.parametrize("shape", [(0, 3, 5, 64), (2, 0, 5, 64), (2, 3, 0, 64), (2, 3, 5, 0), (2, 3, 5, 7)])
def test_empty_sizes(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert torch.equal(rotate(x, *tables(0)), x)
    assert rotate(x[:, :, :0], *tables(0, length=0)).shape == x[:, :, :0].shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_nan_stays_in_its_pair(interleaved: bool) -> None:
    x, table = heads(65), tables(32)
    clean = rotate(x, *table, interleaved=interleaved)
    x = x.clone()
    x[1, 2, 36, 4] = math.nan
    out = rotate(x, *table, interleaved=interleaved)
    hit = torch.zeros_like(x, dtype=torch.bool)
    hit[1, 2, 36, [4, 5] if interleaved else [4, 20]] = True
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (65, 32), (3, 0)])
def test_memory_and_order(head_dim: int, rotary_dim: int, interleaved: bool) -> None:
    """No access outside, no race, nothing unwritten; the same bits in every order of the programs and in every run."""
    x, table = heads(head_dim, torch.bfloat16, seqlen=131), tables(rotary_dim, length=140)
    want = rotate(x, *table, positions=2, interleaved=interleaved)
    for seed in (None, 0):
        with memcheck(shuffle=seed) as check:
            out = rotate(x, *table, positions=2, interleaved=interleaved)
            check.results(out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("strides", [(2**30, 8, 4 * 8, 1), (8, 2**30, 4 * 8, 1), (8, 4 * 8, 2**30, 1), (8, 64, 512, 2**30)])
def test_elements_beyond_two_to_the_31(strides: tuple[int, ...]) -> None:
    """Each axis in its turn is the one whose stride needs 64 bits; 4 GB are reserved, of which only these elements are ever touched."""
    x, table = normal(3, 3, 3, 3, seed=0, dtype=torch.float16), tables(2)
    far = torch.empty(2**31 + 2**20, dtype=torch.float16).as_strided((3, 3, 3, 3), strides)
    far.copy_(x)
    with memcheck():
        out = rotate(far, *table)
    assert torch.equal(out, rotate(x, *table))


def test_tables_that_do_not_fit_are_refused() -> None:
    x = heads(7)
    with pytest.raises(ValueError, match="cos has 4 columns, one for each pair: a head_dim of 7 has at most 3 pairs"):
        rotate(x, *tables(8))
    with pytest.raises(ValueError, match="cos has no rows"):
        rotate(x, *tables(6, length=0))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        rotate(x, tables(6).cos, tables(4).sin)
