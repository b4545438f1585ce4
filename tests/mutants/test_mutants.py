"""The suite is tested: faults planted in copies of the package, each of which a quick slice of the suite must notice.

A fault is a textual patch that must apply exactly once: when the code moves on, the fault has to be planted anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fused_attention

PACKAGE = Path(fused_attention.__file__).parent
SUITE = Path(__file__).parent / "quick_suite.py"


class Fault(NamedTuple):
    file: str
    old: str
    new: str


FAULTS: dict[str, Fault] = {
    "causal-off-by-one": Fault("scores.py", "col <= aligned + problem.window_right", "col < aligned + problem.window_right"),
    "window-left-off-by-one": Fault("scores.py", "col >= aligned - problem.window_left", "col > aligned - problem.window_left"),
    "window-left-ignored": Fault("scores.py", "if problem.window_left is not None:", "if False:"),
    "kv-lengths-off-by-one": Fault("scores.py", "(col < end[:, None, None, None])", "(col <= end[:, None, None, None])"),
    "kv-start-ignored": Fault("scores.py", "(col >= start[:, None, None, None]) & ", ""),
    "kv-lengths-unclamped": Fault("scores.py", "torch.minimum(given.clamp(min=0), lengths[:, None]).unbind(1)", "given.unbind(1)"),
    "mask-ignored": Fault("scores.py", "conditions.append(part(problem.mask, tile))", "pass"),
    "members-see-each-other": Fault(
        "scores.py", "part(where.member_of_row, tile) == part(where.member_of_col, tile)", "part(where.col, tile) >= 0"
    ),
    "offset-tensor-ignored": Fault("scores.py", "given = problem.offset.to(torch.int64)", "given = 0 * problem.offset.to(torch.int64)"),
    "offset-top-left": Fault("scores.py", "return problem.seqlen_k - problem.seqlen_q if", "return 0 if"),
    "alibi-sign": Fault("scores.py", "scores = scores - slopes * distance", "scores = scores + slopes * distance"),
    "alibi-signed-distance": Fault(
        "scores.py", "(part(where.aligned, tile) - part(where.col, tile)).abs()", "(part(where.aligned, tile) - part(where.col, tile))"
    ),
    "softcap-inside-out": Fault("scores.py", "softcap * torch.tanh(scores / softcap)", "torch.tanh(scores / softcap)"),
    "wrong-head-of-a-group": Fault(
        "scores.py",
        "return tensor.reshape(batch, kv_heads, heads // kv_heads * rows, width)",
        "return tensor.unflatten(1, (-1, kv_heads)).transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * rows, width)",
    ),
    "dropout-not-rescaled": Fault("scores.py", "* (1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0)", "* 1.0"),
    "dropout-ignores-the-head": Fault(
        "scores.py", "members * problem.heads + heads, key_visible", "members * problem.heads + 0 * heads, key_visible"
    ),
    "dropout-wrong-word": Fault("dropout.py", "torch.stack(words, dim=-1).flatten(-2)", "torch.stack(words[::-1], dim=-1).flatten(-2)"),
    "dropout-key-high-word": Fault("dropout.py", "(seed[0] >> 32) & WORD", "0 * seed[0]"),
    "acc-not-rescaled": Fault("blockwise.py", "acc = acc * rescale[..., None] + ", "acc = acc + "),
    "row-sum-not-rescaled": Fault("blockwise.py", "row_sum = row_sum * rescale + p.sum(-1)", "row_sum = row_sum + p.sum(-1)"),
    "scale-omitted-in-scores": Fault(
        "blockwise.py", "pairs.cap(pairs.query_key(q, k_tile) * problem.scale,", "pairs.cap(pairs.query_key(q, k_tile),"
    ),
    "empty-row-guard-removed": Fault("blockwise.py", "return torch.where(row_max == NEG_INF, 0.0, row_max)", "return row_max"),
    "sink-missing-in-the-sum": Fault(
        "blockwise.py", "return row_max, torch.exp(sinks - _finite_pivot(row_max))", "return row_max, torch.zeros_like(sinks)"
    ),
    "lse-without-the-maximum": Fault("blockwise.py", "_finite_pivot(row_max) + torch.log(total)", "torch.log(total)"),
    "delta-dropped": Fault("blockwise.py", " - delta[..., None]), visible, 0.0)", "), visible, 0.0)"),
    "dlse-dropped": Fault("blockwise.py", "(dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse", "(dout * out).sum(-1)"),
    "dlse-sign": Fault("blockwise.py", "else (dout * out).sum(-1) - dlse", "else (dout * out).sum(-1) + dlse"),
    "scale-omitted-in-dq": Fault("blockwise.py", "pairs.weights_value(dscores, k) * problem.scale", "pairs.weights_value(dscores, k)"),
    "scale-omitted-in-dk": Fault(
        "blockwise.py",
        "pairs.sum_over_queries(dscores, q, problem.kv_heads) * problem.scale",
        "pairs.sum_over_queries(dscores, q, problem.kv_heads)",
    ),
    "softcap-derivative-omitted": Fault("blockwise.py", "ds * (1 - (capped / problem.softcap) ** 2)", "ds"),
    "bias-gradient-not-reduced": Fault("blockwise.py", "ds.sum_to_size(bias.shape)", "ds[tuple(slice(0, n) for n in bias.shape)]"),
    "bias-gradient-of-the-last-tile": Fault("blockwise.py", "            total += share\n", "            total.copy_(share)\n"),
    "slope-gradient-sign": Fault("blockwise.py", "(-ds * distance).sum_to_size(slopes.shape)", "(ds * distance).sum_to_size(slopes.shape)"),
    "sink-gradient-sign": Fault("blockwise.py", "return -(p * delta).sum((0, 2))", "return (p * delta).sum((0, 2))"),
    "dropout-missing-in-dv": Fault("blockwise.py", "dropped = p if factor is None else p * factor", "dropped = p"),
    "dropout-missing-in-dp": Fault("blockwise.py", "(dp if factor is None else dp * factor)", "dp"),
    "hidden-nan-enters": Fault("scores.py", "tensor.masked_fill(broken[..., None], 0.0), broken", "tensor, broken"),
    "last-key-block-skipped": Fault(
        "blockwise.py", "range(first // BLOCK * BLOCK, last, BLOCK)", "range(first // BLOCK * BLOCK, max(last - BLOCK, 1), BLOCK)"
    ),
    "reference-sink-ignored": Fault("reference.py", "logits = torch.cat((scores, sinks), dim=-1)", "logits = scores"),
    "reference-empty-row-guard": Fault("reference.py", "return lse.masked_fill(lse == NEG_INF, 0.0)", "return lse"),
    "dropout-seed-ignored": Fault(
        "calls.py", "if made.problem.dropout_p == 0 or made.problem.dropout_seed is not None:", "if made.problem.dropout_p == 0:"
    ),
    "torch-kernel-takes-windows": Fault(
        "torch_backend.py", "if problem.window_left is None and problem.kv_lengths is None:", "if problem.kv_lengths is None:"
    ),
    "torch-kernel-takes-hidden-nans": Fault(
        "torch_backend.py", "if not bool(torch.isfinite(k).all() and torch.isfinite(v).all()):", "if False:"
    ),
    "torch-kernel-takes-rows-of-no-key": Fault("torch_backend.py", " or not bool(mask.any(-1).all())", ""),
    "torch-kernel-takes-offsets": Fault("torch_backend.py", "and static_offset(problem) == 0 and", "and"),
    "torch-kernel-takes-other-values": Fault("torch_backend.py", " and problem.head_dim == problem.head_dim_v", ""),
    "torch-kernel-takes-softcap": Fault("torch_backend.py", "problem.softcap, problem.sinks, ", "problem.sinks, "),
    "torch-kernel-takes-dlse": Fault(
        "torch_backend.py", "_fused_call(k, v, problem) if dlse is None else None", "_fused_call(k, v, problem)"
    ),
    "scale-ignored": Fault("validation.py", "return float(scale)", "return float(head_dim**-0.5)"),
    "causal-ignores-the-window": Fault(
        "validation.py",
        "return _near(left), 0 if causal else _near(right)",
        "return None if causal else _near(left), 0 if causal else _near(right)",
    ),
    "merge-without-sinks": Fault("merge.py", "    if sinks is not None:\n", "    if False:\n"),
    "sdpa-bottom-right": Fault("sdpa.py", 'options |= {"causal": True, "offset": 0}', 'options |= {"causal": True}'),
}


def plant(fault: Fault | None, folder: Path) -> None:
    """A copy of the package with one fault; without C++ modules, whose own faults are another test's matter."""
    shutil.copytree(PACKAGE, folder / "fused_attention", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    if fault is not None:
        path = folder / "fused_attention" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str | None]:
    """The first failure of every copy, by the name of its fault; "none" is the package as it is."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork, and a process for each fault would take minutes")
    root = tmp_path_factory.mktemp("mutants").resolve()
    for name, fault in {"none": None, **FAULTS}.items():
        plant(fault, root / name)
    copies = [str(root / name) for name in ("none", *FAULTS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(SUITE), *copies], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return {Path(copy).name: verdict for copy, verdict in json.loads(result.stdout).items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_planted_exactly_once(name):
    fault = FAULTS[name]
    assert (PACKAGE / fault.file).read_text().count(fault.old) == 1, f"{fault.file} no longer holds exactly once: {fault.old}"


def test_the_package_itself_passes(verdicts):
    assert verdicts["none"] is None, verdicts["none"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, verdicts):
    verdict = verdicts[name]
    assert verdict is not None, f"nothing noticed {FAULTS[name]}"
    for error in ("SyntaxError", "ImportError", "NameError"):
        assert error not in verdict, f"the fault is not one of arithmetic: {verdict}"
