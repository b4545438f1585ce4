"""The GPU run without a GPU: its plan, its processes, its summary, a rehearsal from end to end, and the margins its tests stand on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.testing import Case, Inputs

from . import conftest, jobs, plan, sanitized, summary, test_gpu_sanitizer
from .margins import Margins
from .target import Target

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_the_run_is_shorter_than_nine_minutes() -> None:
    assert plan.longest_seconds(plan.STEPS) + plan.REPORT_SECONDS + 10 < plan.TOTAL_SECONDS == 540


def test_every_file_of_tests_is_in_a_step() -> None:
    files = {f"tests/gpu/{path.name}" for path in HERE.glob("test_gpu_*.py")} - {"tests/gpu/test_gpu_plan.py"}
    assert files == {step.command[-1] for step in plan.STEPS if "pytest" in step.command}


def test_the_cuda_kernels_stand_the_tests_that_fit_them() -> None:
    of_cuda = {step.name: step.command[-1] for step in plan.STEPS if step.backend == "cuda"}
    assert of_cuda["cuda"] == "tests/gpu/test_gpu_cuda.py"
    assert {f"cuda-{name}" for name in plan.OF_CUDA_TOO} | {"cuda"} == set(of_cuda)
    assert of_cuda["cuda-matrix"] == "tests/gpu/test_gpu_matrix.py"
    # Which alone read pages, and watch what a kernel reads and where its threads wait.
    assert of_cuda["cuda-caches"] == "tests/gpu/test_gpu_caches.py"
    assert of_cuda["cuda-sanitizer"] == "tests/gpu/test_gpu_sanitizer.py"
    assert plan.STEPS[-2].name == "matrix", "it takes whatever time the others leave"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_compute_sanitizer_watches_the_backend_that_is_judged(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once watched Triton's kernels alone."""
    commands = []

    def watched(tool: str, *arguments: str, seconds: int) -> subprocess.CompletedProcess[str]:
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, f"0.0\nproblems ran\n{test_gpu_sanitizer.CLEAN[tool]}", "")

    monkeypatch.setattr(test_gpu_sanitizer, "watched", watched)
    test_gpu_sanitizer.test_the_tool_has_nothing_to_say("memcheck", Target(torch.device("cuda", 0), backend, rehearsed=False))
    assert commands[-1] == (str(test_gpu_sanitizer.SCRIPT), "cuda", backend)


def test_what_is_watched_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Pages, keys that blocks share and several tiles, in types of 16 and of 32 bits."""
    ran = []
    monkeypatch.setattr(
        Inputs, "run", lambda inputs, backend: ran.append((inputs.q.dtype, *inputs.q.shape[2:], inputs.k.shape[2], backend))
    )
    monkeypatch.setattr(sanitized, "attention_with_cache", lambda q, cache, backend: ran.append((q.dtype, cache.page_size, backend)))
    sanitized.main("cpu", "cuda")
    assert f"{len(ran)} problems ran" in capsys.readouterr().out
    for dtype in (torch.bfloat16, torch.float32):
        assert {(dtype, size, "cuda") for size in sanitized.PAGE_SIZES} <= set(ran)
        assert {(dtype, 131, 64, 195, "cuda"), (dtype, 3, 128, 520, "cuda")} <= set(ran)
    assert len(sanitized.NAMES) * 2 + len(sanitized.LARGER) * 2 + len(sanitized.PAGE_SIZES) * 2 == len(ran)


def test_a_refusal_that_is_meant_is_no_failure() -> None:
    def beyond(reason: str) -> bool:
        return conftest.BEYOND.match(f"backend='cuda' can't run this call: {reason}") is not None

    assert beyond("head_dim is 320, head_dim_v 320, and the cuda backend computes up to 256")
    assert beyond("q is torch.float64, and the cuda backend computes torch.float16, torch.bfloat16 and torch.float32")
    assert not beyond("the compiled module fused_attention._cuda is missing")
    assert not beyond("gradients of bias are needed, and the cuda backend computes those of q, k and v alone so far")


def test_the_machine_is_always_asked() -> None:
    assert [step.name for step in plan.chosen(["sizes"])] == ["machine", "sizes"]
    assert plan.chosen(None) == plan.STEPS


def test_experiments_run_only_when_they_are_named() -> None:
    assert [step.name for step in plan.chosen(["experiments", "sizes"])] == ["machine", "sizes", "experiments"]
    assert plan.longest_seconds(plan.chosen(["experiments"])) + plan.REPORT_SECONDS + 10 < plan.TOTAL_SECONDS
    assert plan.rehearsed(plan.OPTIONAL[0]).command[-2:] == ("--cells", "d64 causal 4k")


def job(tmp_path: Path, program: str, step: str = "step") -> jobs.Job:
    """A process that runs a program with `say(name, event)`, which writes its record."""
    record = tmp_path / f"{step}-0.jsonl"
    say = (
        "import json, os, sys, time\n"
        f"path = {str(record)!r}\n"
        "begun = open(path).read() if os.path.exists(path) else ''\n"
        "def say(name, event, **facts):\n"
        "    open(path, 'a').write(json.dumps({'name': name, 'event': event, 'time': 0, **facts}) + '\\n')\n"
    )
    return jobs.Job(step, [sys.executable, "-c", say + program], dict(os.environ), tmp_path, tmp_path / f"{step}-0.log", record, 60.0)


def names(made: jobs.Job) -> list[str]:
    return [json.loads(line)["name"] for line in made.record.read_text().splitlines()] if made.record.exists() else []


CRASHING = """
for name in "abcd":
    if f'"{name}"' in begun: continue
    say(name, "began")
    if name in "bc": os._exit(3)
    say(name, "ended", outcome="passed")
"""


def test_a_process_that_crashes_goes_on_after_what_it_died_of(tmp_path: Path) -> None:
    made = job(tmp_path, CRASHING)
    jobs.run_together([made], {"step": time.time() + 60}, 1)
    assert made.starts == 3
    assert names(made) == ["a", "a", "b", "c", "d", "d"]


def test_a_process_that_gets_nowhere_is_not_started_for_ever(tmp_path: Path) -> None:
    made = job(tmp_path, "os._exit(3)")
    jobs.run_together([made], {"step": time.time() + 60}, 1)
    assert made.starts == 1


def test_a_process_that_hangs_is_ended_and_the_rest_is_done(tmp_path: Path) -> None:
    made = replace(job(tmp_path, CRASHING.replace("os._exit(3)", "time.sleep(600)")), patience=2.0)
    jobs.run_together([made], {"step": time.time() + 60}, 1)
    assert names(made) == ["a", "a", "b", "c", "d", "d"]


def test_a_step_ends_at_its_limit_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GRACE", 0.0)
    endless = job(tmp_path, "say('x', 'began'); time.sleep(600)", "endless")
    quick = job(tmp_path, "say('y', 'began')", "quick")
    late = job(tmp_path, "say('z', 'began')", "late")
    now = time.time()
    seconds = jobs.run_together([endless, quick, late], {"endless": now + 1.0, "quick": now + 60, "late": now - 1.0}, 3)
    assert time.time() - now < 30
    assert (names(endless), names(quick), names(late)) == (["x"], ["y"], [])
    assert seconds["endless"] >= 0.5
    assert endless.starts == 1


def written(tmp_path: Path, lines: list[dict[str, Any]], step: str = "matrix") -> Path:
    for folder in (f"records/{step}", "logs"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "records" / step / "0.jsonl").write_text("".join(json.dumps({"time": 0, **line}) + "\n" for line in lines))
    return tmp_path


def ended(name: str, outcome: str, message: str = "", **facts: Any) -> list[dict[str, Any]]:
    return [{"name": name, "event": "began"}, {"name": name, "event": "ended", "outcome": outcome, "message": message, "facts": facts}]


MACHINE = {
    "cpu": "chip", "packages": {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2"}, "cuda": "13.0", "cudnn": 91900,
    "gpu": {"name": "NVIDIA H200", "best_gemm": {"bf16": 7.9e14}, "copy_bandwidth": 4.3e12, "nvidia_smi": {"driver_version": "580.1"}},
}  # fmt: skip


def test_the_summary_tells_what_happened(tmp_path: Path) -> None:
    lines = [
        *ended("f.py::one", "passed", used=0.25),
        *ended("f.py::two", "passed", used=0.75),
        *ended("f.py::three", "failed", "out uses 3 times its bound\nmore"),
        *ended("f.py::four", "skipped", "too old"),
        *ended("f.py::five", "skipped", "too old"),
        *ended("f.py::six", "left out", "the time of the step was over"),
        {"name": "f.py::seven", "event": "began"},
    ]
    step = plan.Step("matrix", "every case", ("-c", ""), 10)
    result = summary.result_of(step, written(tmp_path, lines), 12.34)
    assert result.cells == ("matrix", "every case", "2", "2", "2", "1", "12", "75% (two)")
    assert result.wrong
    text = summary.printed([result], MACHINE)
    assert "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0" in text
    assert "790 TFLOP/s of a bf16 product, 4.30 TB/s of a copy" in text
    assert "matrix: three: out uses 3 times its bound more" in text
    assert "matrix: seven: began and never ended" in text
    assert "matrix: skipped 2: too old" in text
    assert text.endswith("wrong: matrix")
    json.dumps(result.as_json(), allow_nan=False)


def test_a_step_that_did_nothing_is_wrong(tmp_path: Path) -> None:
    written(tmp_path, [])
    (tmp_path / "logs" / "matrix-0.log").write_text("ImportError: no torch\n\n")
    result = summary.result_of(plan.Step("matrix", "every case", ("-c", ""), 10), tmp_path, 1.0)
    assert result.failures == ("nothing was done: ImportError: no torch",)
    left_out = summary.result_of(plan.Step("matrix", "every case", ("-c", ""), 10), written(tmp_path, ended("one", "left out")), 1.0)
    assert left_out.wrong
    good = summary.result_of(plan.Step("matrix", "every case", ("-c", ""), 10), written(tmp_path, ended("one", "passed")), 1.0)
    assert summary.printed([good], MACHINE).endswith("every step held")


def test_a_step_whose_tests_were_all_skipped_judged_nothing(tmp_path: Path) -> None:
    """It once read as one that held."""
    step = plan.Step("cuda-matrix", "every case", ("-c", ""), 10)
    idle = summary.result_of(step, written(tmp_path, ended("one", "skipped", "nvcc was not found"), step.name), 1.0)
    text = summary.printed([idle], MACHINE)
    assert not idle.wrong
    assert "nothing was judged by: cuda-matrix" in text
    assert not text.endswith("every step held")


def test_results_lie_in_a_folder_of_the_machine() -> None:
    assert summary.folder_name(MACHINE) == "nvidia-h200"
    assert summary.folder_name({"gpu": None}) == "rehearsal"


def rehearse(tmp_path: Path, backend: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, "tests/gpu/run.py", "--rehearse", backend, "--steps", "sizes", "--out", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    return made.returncode, made.stdout + made.stderr, json.loads((tmp_path / "rehearsal" / "gpu.json").read_text())


@pytest.mark.slow
def test_a_rehearsal_runs_from_beginning_to_end(tmp_path: Path) -> None:
    status, output, content = rehearse(tmp_path, "torch")
    assert status == 0, output
    assert "every step held" in output
    assert content["steps"]["sizes"]["passed"] >= 5
    assert content["environment"]["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.slow
def test_a_rehearsal_fails_where_a_backend_does(tmp_path: Path) -> None:
    """The cuda backend cannot compute CPU tensors."""
    status, output, content = rehearse(tmp_path, "cuda")
    assert status == 1, output
    assert "wrong: sizes" in output
    assert any("backend='cuda' can't run this call" in failure for failure in content["steps"]["sizes"]["failures"])


@pytest.mark.parametrize("layout", ["contiguous", "strided", "column", "offset"])
@pytest.mark.parametrize("margin", [512, 513])
def test_margins_notice_who_writes_outside(layout: str, margin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q = Case("margins", layout=layout).make().q
    margins = Margins(torch.device("cpu"), margin)
    placed = margins.copy("q", q)
    assert torch.equal(placed, q)
    assert placed.stride() == q.stride()
    assert (placed.data_ptr() % 16 == 0) == (margin == 512)
    placed.fill_(1.0)
    assert margins.damaged() == []
    beyond = placed.as_strided((1,), (1,), placed.storage_offset() - 1)
    assert beyond.isnan().all()
    beyond.fill_(0.0)
    assert margins.damaged() == ["q"]

    margins.catch_allocations(monkeypatch)
    caught = torch.empty_like(q), q.new_empty(3), torch.zeros(2, 3), q.new_full((4,), 5.0)
    monkeypatch.undo()
    assert len(margins.placed) == 1 + len(caught)
    assert caught[0].isnan().all()
    assert caught[1].isnan().all()
    assert (caught[2] == 0.0).all()
    assert (caught[3] == 5.0).all()
