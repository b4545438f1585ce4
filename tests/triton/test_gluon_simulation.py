"""The warp-specialised forward on a simulated machine: right in every order that its barriers allow, and faults in them are noticed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon cannot be interpreted; the simulation runs without the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from fused_attention.benchmarks.experiments import warp_specialized

from fused_attention.testing import Case, check
from fused_attention.validation import check as problem_of

from .gluon_machine import SimulationError, launcher

CASES = (
    Case("causal", batch=1, heads=4, kv_heads=2, seqlen_q=256, seqlen_k=256, head_dim=64, causal=True),
    Case("causal, more keys", batch=1, heads=2, seqlen_q=128, seqlen_k=384, head_dim=64, causal=True),
    Case("full", batch=2, heads=1, seqlen_q=128, seqlen_k=512, head_dim=64),
    Case("one tile of keys", batch=1, heads=3, seqlen_q=128, seqlen_k=128, head_dim=128, dtype=torch.float16),
    Case("small tiles of keys", batch=1, heads=1, seqlen_q=256, seqlen_k=256, head_dim=256, causal=True),
)
LONG = Case("long", batch=1, heads=4, kv_heads=2, seqlen_q=128, seqlen_k=896, head_dim=64, causal=True)
PROGRAMS = 2  # fewer than tiles of queries: each computes several


def run(case: Case, monkeypatch: pytest.MonkeyPatch, seed: int, ping_pong: bool, module: ModuleType = warp_specialized) -> None:
    inputs = case.make(dtype=torch.bfloat16)
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    monkeypatch.setattr(module, "launch", launcher(module, seed))
    monkeypatch.setattr(module.order, "persistent", lambda programs, device: min(programs, PROGRAMS))
    module.forward(q, k, v, out, lse, problem_of(q, k, v, **inputs.options), ping_pong=ping_pong)
    check({"out": out, "lse": lse}, inputs.truth(backward=False))


def run_in_orders(case: Case, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    for seed in range(8):
        run(case, monkeypatch, seed, seed % 2 == 0, module)


@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_warp_specialised_forward_is_right_in_any_order(case: Case, ping_pong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        run(case, monkeypatch, seed, ping_pong)


FAULTS = {
    "the producer waits for no empty slot": ("    mbarrier.wait(ring.empty.index(slot), (times & 1) ^ 1)\n", ""),
    "empty slots of the wrong phase": ("(times & 1) ^ 1", "times & 1"),
    "full slots of the wrong phase": ("(turn // SLOTS) & 1, pred", "(turn // SLOTS + 1) & 1, pred"),
    "keys never released": ("                release(k_ring, turn + 1)\n", ""),
    "keys of the tile before": (
        "products = multiply(q_tile, k_ring, turn + 1, SCORES)",
        "products = multiply(q_tile, k_ring, turn, SCORES)",
    ),
    "values released too early": (
        "acc = warpgroup_mma_wait(0, [acc])\n                release(v_ring, turn)",
        "release(v_ring, turn)\n                acc = warpgroup_mma_wait(0, [acc])",
    ),
    "values never released": ("                release(v_ring, turn)\n                weights", "                weights"),
    "nobody waits for values": ("                await_full(v_ring, turn, True)\n                acc", "                acc"),
    "nobody waits for queries": ("        mbarrier.wait(q_ring.full.index(NUMBER), visits & 1)\n", ""),
    "queries released before out has left": ("        tma.store_wait(0)\n", ""),
    "no fence before out leaves": ("        fence_async_shared()\n", ""),
    "no first turn": ("        mbarrier.arrive(turns.index(0), count=1)\n", "        pass\n"),
    "the diagonal is hidden": ("cols[None, :] <= sight", "cols[None, :] < sight"),
    "a key too many is seen": ("cols[None, :] <= sight", "cols[None, :] <= 1 + sight"),
    "the first tile of keys is left out": ("for tile in range(place.tiles):", "for tile in range(place.tiles - 1):"),
    "nothing is rescaled": ("acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]", "acc = acc * 1.0"),
    "a group reads another's keys": ("head // GROUP * plan.seqlen_k", "head % GROUP * plan.seqlen_k"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, (right, wrong) = Path(str(warp_specialized.__file__)).read_text(), FAULTS[name]
    assert source.count(right) == 1, "the source has changed: mend the fault"
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(right, wrong).replace("from . import", f"from {warp_specialized.__package__} import"))
    spec = importlib.util.spec_from_file_location("faulty", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faulty", module)
    spec.loader.exec_module(module)
    with pytest.raises((SimulationError, AssertionError)):
        run_in_orders(LONG, monkeypatch, module)
