"""The C++ CPU kernels against their definition in float64, and their promises: any layout, hidden NaN contained, bits that never vary."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.cpu_backend import CpuBackend
from fused_attention.problem import AttentionOutput, Gradients, Layout, Problem

CPU = CpuBackend()
MISSING = CPU.unavailable()
compiled = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
EPSILON = torch.finfo(torch.float32).eps
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Call:
    """One problem with its tensors."""

    q: Tensor  # (batch, heads, seqlen_q, head_dim)
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    options: dict[str, Any]

    @property
    def problem(self) -> Problem:
        layouts = {"q": Layout.of(self.q), "k": Layout.of(self.k), "v": Layout.of(self.v)}
        facts = {"scale": 0.25, "dtype": self.q.dtype, "device": self.q.device, "gradients": frozenset("qkv")} | layouts
        return Problem(**(facts | self.options))

    def run(self) -> dict[str, Tensor]:
        out, lse = CPU.forward(self.q, self.k, self.v, self.problem)
        gradients = CPU.backward(self.dout, self.dlse, self.q, self.k, self.v, out, lse, self.problem)
        return dict(zip(NAMES, (out, lse, gradients.q, gradients.k, gradients.v), strict=True))

    def but(self, **changes: Any) -> Call:
        return Call(**({name: getattr(self, name) for name in self.__dataclass_fields__} | changes))


def make(
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    **options: Any,
) -> Call:
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k * 10 + head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = head_dim if head_dim_v is None else head_dim_v
    return Call(
        q=normal(batch, heads, seqlen_q, head_dim),
        k=normal(batch, kv_heads, seqlen_k, head_dim),
        v=normal(batch, kv_heads, seqlen_k, wide),
        dout=normal(batch, heads, seqlen_q, wide),
        dlse=normal(batch, heads, seqlen_q),
        options={"scale": head_dim**-0.5} | options,
    )


def visible(problem: Problem) -> Tensor:
    """(batch, seqlen_q, seqlen_k), pair by pair from the definition."""
    batch, seqlen_q, seqlen_k = problem.batch, problem.seqlen_q, problem.seqlen_k
    result = torch.zeros(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        start, end = 0, seqlen_k
        if problem.kv_lengths is not None:
            given = problem.kv_lengths[b].tolist()
            start, end = (min(max(x, 0), seqlen_k) for x in (given if isinstance(given, list) else (0, given)))
        offset = problem.offset[b].item() if isinstance(problem.offset, Tensor) else problem.offset
        offset = end - seqlen_q if offset is None else offset
        for i in range(seqlen_q):
            lowest = start if problem.window_left is None else max(start, i + offset - problem.window_left)
            highest = end if problem.window_right is None else min(end, i + offset + problem.window_right + 1)
            result[b, i, max(lowest, 0) : max(highest, 0)] = True
    return result


def definition(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every result in float64, and the magnitude that its rounding errors scale with."""
    problem, group = call.problem, call.problem.group
    q, dout = call.q.double(), call.dout.double()
    k, v = (x.double().repeat_interleave(group, 1) for x in (call.k, call.v))
    dlse = torch.zeros(q.shape[:3]).double() if call.dlse is None else call.dlse.double()
    seen = visible(problem)[:, None]
    scores = (problem.scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    out = p @ v
    dscores = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True) + dlse[..., None])
    largest = (abs(problem.scale) * q.abs() @ k.abs().mT).masked_fill(~seen, 0.0)
    growth = 1 + (
        largest.amax(-1, keepdim=True) if largest.shape[-1] else torch.zeros(*q.shape[:3], 1)
    )  # what an error of the scores does to p
    rough = p * growth * (dout.abs() @ v.abs().mT + (dout.abs() * (p @ v.abs())).sum(-1, keepdim=True) + dlse.abs()[..., None])

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    truth = {"out": out, "lse": lse, "dq": problem.scale * dscores @ k}
    truth |= {"dk": shared(problem.scale * dscores.mT @ q), "dv": shared(p.mT @ dout)}
    size = {"out": growth * (p @ v.abs()), "lse": growth[..., 0], "dq": abs(problem.scale) * rough @ k.abs()}
    size |= {"dk": shared(abs(problem.scale) * rough.mT @ q.abs()), "dv": shared((p * growth).mT @ dout.abs())}
    return truth, size


def check(call: Call) -> dict[str, Tensor]:
    """Runs a call and holds every element to a few roundings of its magnitude."""
    results = call.run()
    truth, size = definition(call)
    for name, expected in truth.items():
        got = results[name]
        assert got.shape == expected.shape, name
        assert got.dtype == torch.float32, name
        error = torch.where(got == expected, 0.0, (got - expected).abs())
        worst = (error / (EPSILON * size[name] + 1e-37)).max().item() if got.numel() else 0.0
        assert worst <= 6, f"{name} is off by {worst:.1f} roundings"
    return results


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), name


@compiled
class TestFormula:
    """Against float64; TestInstructionSets runs it for every table of kernels."""

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("seqlen", [1, 3, 17, 63, 65, 129, 257, 300])
    def test_lengths(self, seqlen, causal):
        check(make(seqlen, seqlen, 24, batch=1, window_right=0 if causal else None))

    @pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 131), (131, 1), (37, 260), (260, 37), (128, 129), (65, 64)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_queries_and_keys_differ(self, seqlen_q, seqlen_k, causal):
        check(make(seqlen_q, seqlen_k, window_right=0 if causal else None))

    @pytest.mark.parametrize(
        ("head_dim", "head_dim_v"), [(1, 1), (3, 8), (8, 3), (17, 40), (40, 17), (64, 64), (80, 80), (128, 96), (192, 128), (5, 257)]
    )
    def test_head_dims(self, head_dim, head_dim_v):
        check(make(67, 140, head_dim, head_dim_v, batch=1, window_right=0))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (5, 5)])
    @pytest.mark.parametrize("seqlen_q", [1, 5, 70])
    def test_groups(self, heads, kv_heads, seqlen_q):
        check(make(seqlen_q, 70, heads=heads, kv_heads=kv_heads, window_right=0))

    @pytest.mark.parametrize("window", [(0, 0), (3, 5), (40, None), (None, 17), (130, 130), (2**62, 2**62), (0, 2**70)])
    @pytest.mark.parametrize("offset", [None, 0, -9, 61])
    def test_windows(self, window, offset):
        check(make(150, 170, batch=1, window_left=window[0], window_right=window[1], offset=offset))

    @pytest.mark.parametrize("offset", [2**63 - 1, -(2**63), 2**70, -(2**70)])
    def test_far_offsets(self, offset):
        for window in ((None, 0), (0, None), (0, 0), (7, 2**40)):
            call = make(20, 30, batch=1, window_left=window[0], window_right=window[1], offset=offset)
            results = check(call)
            assert not results["out"][~visible(call.problem).any(-1)[:, None].expand(1, 2, 20)].any()

    def test_offset_for_each_member(self):
        offset = torch.tensor([5, -3, 2**63 - 1, -(2**63)])
        for window in ((8, 2), (None, 2), (8, None)):
            check(make(33, 40, batch=4, window_left=window[0], window_right=window[1], offset=offset))
        check(make(33, 40, batch=3, window_right=0, offset=torch.tensor([[5, 0], [-40, 0], [200, 0]], dtype=torch.int32)[:, 0]))

    def test_lengths_of_members(self):
        lengths = torch.tensor([0, 1, 128, 129, 150, 151, -7, 2**62])
        for dtype in (torch.int32, torch.int64):
            check(make(40, 150, batch=8, kv_lengths=lengths.clamp(-(2**31), 2**31 - 1).to(dtype)))
            check(make(40, 150, batch=8, window_right=0, kv_lengths=lengths.clamp(-(2**31), 2**31 - 1).to(dtype)))

    def test_intervals_of_members(self):
        lengths = torch.tensor([[0, 150], [7, 9], [130, 150], [9, 7], [-5, 2**40], [2**62, 2**63 - 1], [-(2**63), 3], [150, 150]])
        for options in ({}, {"window_right": 0}, {"window_left": 20, "window_right": 3}):
            check(make(40, 150, batch=8, kv_lengths=lengths, **options))
            check(make(40, 150, batch=8, kv_lengths=lengths.t().contiguous().t(), **options))

    @pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, 3.0])
    def test_scales(self, scale):
        check(make(50, 140, 32, window_right=0, scale=scale))

    def test_without_a_gradient_of_lse(self):
        check(make(50, 140, window_right=0).but(dlse=None))

    def test_rows_that_see_nothing(self):
        results = check(make(50, 20, window_right=0))
        assert (results["lse"][:, :, :30] == -torch.inf).all()
        assert not results["out"][:, :, :30].any()
        assert not results["dq"][:, :, :30].any()
        assert results["out"][:, :, 30:].all()

    @pytest.mark.parametrize("sizes", [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
    def test_empty_sizes(self, sizes):
        seqlen_q, seqlen_k, batch = sizes
        check(make(seqlen_q, seqlen_k, batch=batch))

    def test_no_query_heads(self):
        results = make(5, 7, heads=0).run()
        assert results["dk"].shape == (2, 2, 7, 16)
        assert not results["dk"].any()
        assert not results["dv"].any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("options", [{"window_right": 0}, {"window_left": 9, "window_right": 4}, {"window_left": 140}], ids=str)
    def test_what_is_not_finite_reaches_the_rows_that_see_it(self, bad, options):
        call = make(90, 150, 20, batch=1, kv_lengths=torch.tensor([[2, 149]]), **options)
        seen = visible(call.problem)[0]
        clean = call.run()
        for key in (0, 1, 2, 70, 100, 101, 127, 128, 148, 149):
            rows = seen[:, key]
            keys = seen[rows].any(0)
            for name in ("k", "v"):
                spoiled = getattr(call, name).clone()
                spoiled[0, 0, key, 3] = bad
                results = call.but(**{name: spoiled}).run()
                # An infinite score of the right sign is a weight of 0 or leaves one key alone, by IEEE's rules.
                sure = name == "v" or bad != bad
                touched = {"out": rows, "dq": rows, "dk": keys, "dv": keys if name == "k" else torch.zeros_like(keys)}
                for tensor, where in touched.items():
                    got, before = results[tensor][0], clean[tensor][0]
                    assert torch.equal(got[0, ~where], before[0, ~where]), f"{name}[{key}] = {bad} leaks into {tensor}"
                    assert torch.equal(got[1], before[1]), f"{name}[{key}] = {bad} leaks into another head's {tensor}"
                    if sure:
                        assert (~got[0, where].isfinite()).any(-1).all(), f"{name}[{key}] = {bad} is lost from {tensor}"

    @pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
    @pytest.mark.parametrize("name", ["q", "dout"])
    @pytest.mark.parametrize("hidden_by", ["window", "mask"])
    def test_a_query_that_is_not_finite_reaches_the_keys_it_sees(self, hidden_by, name, options):
        call = make(90, 150, 20, batch=1, window_left=20, window_right=0, **options)
        seen = visible(call.problem)[0]
        if hidden_by == "mask":
            call = call.but(options=call.options | {"window_left": None, "window_right": None, "mask": seen[None, None]})
        clean = call.run()
        for row in (0, 1, 31, 32, 70, 89):
            spoiled = getattr(call, name).clone()
            spoiled[0, 0, row] = torch.nan
            results = call.but(**{name: spoiled}).run()
            others = torch.arange(90) != row
            assert torch.equal(results["dq"][0, 0, others], clean["dq"][0, 0, others])
            for tensor in ("dk", "dv"):
                got, before = results[tensor][0, 0], clean[tensor][0, 0]
                assert torch.equal(got[~seen[row]], before[~seen[row]]), f"{name}[{row}] leaks into {tensor}"
                assert got[seen[row]].isnan().all(), f"{name}[{row}] is lost from {tensor}"


@compiled
class TestLayouts:
    """Any strides give the same bits as dense tensors."""

    @staticmethod
    def same(call: Call, **moved: Tensor) -> dict[str, Tensor]:
        results = call.but(**moved).run()
        equal(check(call), results)
        return results

    @pytest.mark.parametrize("head_dim", [16, 19, 64])
    def test_sequence_before_heads(self, head_dim):
        call = make(70, 70, head_dim, window_right=0)
        moved = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "dout")}
        results = self.same(call, **moved)
        for name in ("out", "dq", "dk", "dv"):
            assert results[name].stride() == moved["q"].stride(), name

    def test_views_of_one_projection(self):
        call = make(70, 70, 24)
        fused = torch.stack((call.q, call.k, call.v)).permute(1, 3, 0, 2, 4).contiguous()
        self.same(call, **dict(zip("qkv", fused.permute(2, 0, 3, 1, 4), strict=True)))

    def test_every_other_row(self):
        call = make(70, 70, 24)
        moved = {name: getattr(call, name).repeat_interleave(2, 2)[:, :, ::2] for name in ("q", "k", "v", "dout")}
        self.same(call, **moved)

    @pytest.mark.parametrize("head_dim", [7, 16])
    def test_last_stride_is_not_one(self, head_dim):
        call = make(70, 70, head_dim, head_dim + 3, window_right=0)
        moved = {name: getattr(call, name).mT.contiguous().mT for name in ("q", "k", "v", "dout")}
        results = self.same(call, **moved)
        assert results["dq"].stride() == moved["q"].stride()
        assert results["out"].stride(3) == 70

    def test_expanded(self):
        call = make(70, 70, 16, heads=4, kv_heads=4)
        one = call.k[:1, :1].expand(2, 4, 70, 16)
        dense = call.but(k=one.contiguous(), v=one.contiguous(), dout=torch.ones(2, 4, 70, 16))
        self.same(dense, k=one, v=one, dout=torch.ones(()).expand(2, 4, 70, 16))
        assert call.but(k=one).run()["dk"].is_contiguous()

    def test_unaligned(self):
        call = make(70, 70, 16)
        shifted = {name: torch.cat((torch.zeros(1), getattr(call, name).flatten()))[1:].view_as(getattr(call, name)) for name in "qkv"}
        self.same(call, **shifted)


@compiled
class TestPromises:
    def test_threads_do_not_change_a_bit(self):
        calls = [
            make(300, 300, 32, batch=1, heads=1, kv_heads=1, window_right=0),  # threads share a head
            make(257, 513, 16, batch=1, heads=4, kv_heads=1, window_left=100, window_right=30),
            make(129, 140, 16, batch=2, heads=4, kv_heads=2),  # each has its own
        ]
        single = [call.run() for call in calls]
        torch.set_num_threads(2)
        try:
            for _ in range(3):
                for call, before in zip(calls, single, strict=True):
                    equal(before, call.run())
        finally:
            torch.set_num_threads(1)

    def test_batch_neighbours_do_not_change_a_bit(self):
        lengths = torch.tensor([[0, 140], [3, 77], [9, 9]])
        call = make(45, 140, 20, batch=3, window_right=0, kv_lengths=lengths)
        whole = call.run()
        for b in range(3):
            alone = {name: getattr(call, name)[b : b + 1] for name in ("q", "k", "v", "dout", "dlse")}
            options = call.options | {"kv_lengths": lengths[b : b + 1]}
            equal({name: x[b : b + 1] for name, x in whole.items()}, Call(**alone, options=options).run())

    @pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"window_left": 150, "window_right": 2}], ids=str)
    def test_a_row_does_not_depend_on_its_neighbours(self, options):
        # A head_dim of no whole vectors: a few rows of another take the kernel for decoding, and its order of sums.
        call = make(200, 300, 21, batch=1, heads=4, kv_heads=1, **options)
        whole = CPU.forward(call.q, call.k, call.v, call.problem)
        for rows in (slice(0, 1), slice(5, 24), slice(33, 150), slice(199, 200)):
            part = call.but(q=call.q[:, :, rows], options=call.options | {"offset": 100 + rows.start})
            out, lse = CPU.forward(part.q, part.k, part.v, part.problem)
            assert torch.equal(out, whole.out[:, :, rows])
            assert torch.equal(lse, whole.lse[:, :, rows])

    def test_hidden_keys_do_not_change_a_bit(self):
        call = make(90, 150, 20, batch=1, window_left=20, window_right=0)
        spoiled = call.k.clone(), call.v.clone()
        for x in spoiled:
            x[:, :, :30] = torch.nan  # row 0 stands at key 60
        equal(dict(call.run().items()), call.but(k=spoiled[0], v=spoiled[1]).run())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("options", [{}, {"softcap": 4.0}], ids=str)
    def test_values_of_later_keys_do_not_change_a_bit(self, dtype, options):
        """Even and odd keys, for some kernels add them up in pairs."""
        call = make(65, 65, 20, batch=1, window_right=0, **options)
        call = call.but(**{name: getattr(call, name).to(dtype) for name in ("q", "k", "v", "dout")})
        clean = CPU.forward(call.q, call.k, call.v, call.problem)
        for key in (13, 30, 63, 64):
            v = call.v.clone()
            v[:, :, key] = torch.nan
            out, lse = CPU.forward(call.q, call.k, v, call.problem)
            assert torch.equal(out[:, :, :key], clean.out[:, :, :key])
            assert torch.equal(lse, clean.lse)
            assert out[:, :, key:].isnan().all()

    @pytest.mark.parametrize("shape", [(1, 1, 1, 384), (2, 1, 40, 384)])
    def test_tiles_that_a_mask_hides_as_a_whole_might_not_be_there(self, shape):
        """Keys 128 to 255 are a tile, and without them the tiles are the same ones: so are the bits."""
        call = make(40, 384, 20)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 128:256] = False
        left = torch.cat((torch.arange(128), torch.arange(256, 384)))
        spoiled = call.k.clone(), call.v.clone()
        for x in spoiled:
            x[:, :, 128:256] = torch.nan
        masked = call.but(k=spoiled[0], v=spoiled[1], options=call.options | {"mask": mask}).run()
        for name in ("dk", "dv"):
            assert not masked[name][:, :, 128:256].any()
            masked[name] = masked[name][:, :, left]
        expected = call.but(k=call.k[:, :, left], v=call.v[:, :, left]).run()
        for name in ("out", "lse"):
            assert torch.equal(masked[name], expected[name]), name
        for name in ("dq", "dk", "dv"):
            torch.testing.assert_close(masked[name], expected[name])

    def test_equal_scores_weigh_exactly_the_same(self):
        call = make(4, 256, 8, scale=0.0)
        v = torch.randint(-8, 8, call.v.shape).float()
        out, lse = CPU.forward(call.q, call.k, v, call.problem)
        assert torch.equal(out, v.mean(2, keepdim=True).expand_as(out))
        assert torch.allclose(lse, torch.tensor(256.0).log(), rtol=0, atol=5e-7)

    def test_only_the_gradients_asked_for(self):
        call = make(70, 70)
        everything = call.run()
        out, lse = CPU.forward(call.q, call.k, call.v, call.problem)
        for names in ("q", "k", "v", "qv", ""):
            problem = call.problem._replace(gradients=frozenset(names))
            gradients = CPU.backward(call.dout, call.dlse, call.q, call.k, call.v, out, lse, problem)
            for name in "qkv":
                got = getattr(gradients, name)
                assert got is None if name not in names else torch.equal(got, everything[f"d{name}"])

    def test_inside_a_forked_child(self):
        script = """
import os, torch
from fused_attention.cpu_backend import CpuBackend
from fused_attention.problem import Layout, Problem
torch.set_num_threads(2)
q = torch.randn(1, 4, 300, 16)  # too few elements for PyTorch's own operators to use threads
problem = Problem(*[Layout.of(q)] * 3, dtype=q.dtype, device=q.device, scale=0.1, gradients=frozenset("qkv"))
def run():
    out, lse = CpuBackend().forward(q, q, q, problem)
    return CpuBackend().backward(out, None, q, q, q, out, lse, problem).q
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), before) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@compiled
class TestInstructionSets:
    @staticmethod
    def isa(wanted: str) -> subprocess.CompletedProcess[str]:
        from fused_attention import _cpu

        # By its path: the module needs no torch, whose import takes seconds.
        script = "import sys; sys.path[:0] = sys.argv[1:]; import _cpu; print(_cpu.isa())"
        environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": wanted}
        command = [sys.executable, "-c", script, str(Path(_cpu.__file__).parent)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
    def test_every_table(self, isa):
        answer = self.isa(isa)
        if answer.returncode:
            pytest.skip(f"this CPU has no {isa}: {answer.stderr.splitlines()[-1]}")
        assert answer.stdout.strip() == isa
        from fused_attention import _cpu

        if isa == _cpu.isa():
            pytest.skip(f"{isa} is what the other tests run on")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--import-mode=importlib",
            __file__,
            *(str(Path(__file__).parent / name) for name in ("test_cpu_decode.py", "test_matrix.py")),
            "-k",
            "TestFormula or TestPromises and not fork or test_cpu_decode or equals_the_oracle and cpu",
        ]
        environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": isa}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:]

    def test_unknown_name(self):
        answer = self.isa("avx1024")
        assert answer.returncode == 1
        assert "RuntimeError: FUSED_ATTENTION_CPU_ISA is 'avx1024', and this CPU can run" in answer.stderr
        assert "baseline: name one of these, or unset the variable" in answer.stderr


def test_what_is_unsupported_says_so():
    plain = make(5, 7).problem
    assert CPU.unsupported(plain) is None
    assert CPU.unsupported(plain._replace(device=torch.device("meta"))) == "q is on meta, and the cpu backend computes on CPU tensors"


def test_types_of_the_results():
    if MISSING:
        pytest.skip(MISSING)
    call = make(5, 7, 4, 6)
    result = CPU.forward(call.q, call.k, call.v, call.problem)
    assert isinstance(result, AttentionOutput)
    assert result.lse.is_contiguous()
    assert isinstance(CPU.backward(call.dout, None, call.q, call.k, call.v, *result, call.problem), Gradients)
