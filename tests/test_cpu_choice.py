"""Where PyTorch's own kernels are expected to be faster, the automatic choice takes them and says why; who asks for cpu still gets it."""

from __future__ import annotations

import re

import pytest
import torch

from fused_attention import attention, cpu_backend, explain, plans
from fused_attention.backend import KERNELS
from fused_attention.cpu_arguments import Arguments
from fused_attention.validation import check

compiled = pytest.mark.skipif(KERNELS["cpu"].unavailable() is not None, reason=str(KERNELS["cpu"].unavailable()))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(plans, "_remembered", {})


def operands(dtype=torch.bfloat16, seqlen_q=5):
    return torch.randn(1, 4, seqlen_q, 16).to(dtype), *(torch.randn(1, 4, 7, 16).to(dtype) for _ in range(2))


@compiled
@pytest.mark.parametrize(
    ("switch", "dtype", "sentence"),
    [("_is_baseline", torch.float32, "only the baseline is known"), ("_multiplies_tiles", torch.bfloat16, r"\(AMX\)")],
)
def test_the_choice_falls_on_pytorch_with_a_reason(switch, dtype, sentence, monkeypatch):
    q, k, v = operands(dtype)
    assert explain(q, k, v).backend == "cpu"
    monkeypatch.setattr(cpu_backend, switch, lambda: True)
    chosen = explain(q, k, v)
    assert chosen.backend == "torch"
    assert re.search(sentence, chosen.reasons["cpu"])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(attention(q, k, v, backend="cpu"), attention(q, k, v), **tolerance)


@compiled
def test_tiles_of_bfloat16_decide_nothing_else(monkeypatch):
    monkeypatch.setattr(cpu_backend, "_multiplies_tiles", lambda: True)
    assert explain(*operands(torch.float32)).backend == "cpu"
    assert explain(*operands(seqlen_q=1)).backend == "cpu"
    assert explain(*operands(), window=(3, 0)).backend == "cpu"
    assert explain(*operands(), causal=True).backend == "torch"


def test_kernels_get_lengths_that_nobody_else_can_change():
    """They were read in place: clamped, changed by another thread, and read again they could lead outside memory."""
    q, k, v = operands(torch.float32)
    options = {"kv_lengths": torch.tensor([[1, 6]]), "offset": torch.tensor([2])}
    call = Arguments(q, k, v, torch.empty_like(q), torch.empty(1, 4, 5), check(q, k, v, **options))
    given = {address for tensor in options.values() for address in (tensor.data_ptr(), tensor.data_ptr() + 8)}
    assert not given & set(call.visible)
    kept = {tensor.data_ptr(): tensor for tensor in call._kept}
    _, _, starts, ends, stride, offsets, _, _ = call.visible
    assert kept[starts].tolist() == [[1, 6]]
    assert (ends, stride) == (starts + 8, 2)
    assert kept[offsets].tolist() == [2]
