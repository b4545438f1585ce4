"""The C++ CPU kernels' promises: bits that never vary, hidden keys that count for nothing, gradients that were asked for alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fused_attention.problem import AttentionOutput, Gradients

from .cpu_calls import CPU, Call, compiled, equal, make


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


def test_what_is_unsupported_says_so():
    plain = make(5, 7).problem
    assert CPU.unsupported(plain) is None
    assert CPU.unsupported(plain._replace(device=torch.device("meta"))) == "q is on meta, and the cpu backend computes on CPU tensors"


@compiled
def test_types_of_the_results():
    call = make(5, 7, 4, 6)
    result = CPU.forward(call.q, call.k, call.v, call.problem)
    assert isinstance(result, AttentionOutput)
    assert result.lse.is_contiguous()
    assert isinstance(CPU.backward(call.dout, None, call.q, call.k, call.v, *result, call.problem), Gradients)
