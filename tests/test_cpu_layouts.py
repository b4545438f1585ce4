"""The C++ CPU kernels on tensors of any strides: the same bits as on dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cpu_calls import Call, check, compiled, equal, make


@compiled
class TestLayouts:
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
