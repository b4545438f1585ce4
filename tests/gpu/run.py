"""`make gpu`: proves the package on this machine's GPU and times it, in this Python with nothing installed and no network.

python tests/gpu/run.py [--steps NAME ...] [--out FOLDER] [--rehearse BACKEND]        exit status 1 if anything failed

Steps fail alone. A process that loses the device, crashes or hangs is started again and goes on after what it died of.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jobs import Job, run_together
from plan import BENCHMARK, EXPERIMENTS, MACHINE, OPTIONAL, PHASES, REPORT_SECONDS, STEPS, TOTAL_SECONDS, Step, chosen, rehearsed
from summary import StepResult, folder_name, printed, result_of

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
LAST_SECONDS = 10  # of a step, in which nothing new begins


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    started = time.time()
    steps = chosen(args.steps)
    steps = tuple(rehearsed(step) for step in steps) if args.rehearse else steps
    for leftover in ("records", "logs"):
        shutil.rmtree(WORK / leftover, ignore_errors=True)
        (WORK / leftover).mkdir(parents=True)
    for library in (WORK / "cuda").glob("_cuda.*.so"):
        library.unlink()  # of other sources, another compiler or another GPU
    site = _link_sources()
    environment = _environment(site, args.rehearse)
    seconds: dict[str, float] = {}
    for phase in PHASES:
        _link_cuda(site)
        jobs = [job for step in steps if step.phase == phase for job in _jobs(step, environment)]
        limits = {step.name: time.time() + step.seconds for step in steps if step.phase == phase}
        latest = started + TOTAL_SECONDS - REPORT_SECONDS
        print(f"{phase}: {', '.join(limits)}", flush=True)
        width = (os.cpu_count() or 1) * 5 // 4  # some wait for the GPU
        seconds |= run_together(jobs, {name: min(limit, latest) for name, limit in limits.items()}, width)
        machine = _machine()
        if machine is None or not (machine.get("gpu") or args.rehearse):
            print(
                _last_lines(WORK / "logs" / "machine-0.log")
                if machine is None
                else "torch sees no GPU on this machine: make gpu is for one"
            )
            return 2
    results = [result_of(step, WORK, seconds.get(step.name, 0.0)) for step in steps if step.name != MACHINE.name]
    path = _write(results, machine, args.out)
    print(_table(environment))
    if EXPERIMENTS in seconds:
        print((WORK / "logs" / f"{EXPERIMENTS}-0.log").read_text())
    print(printed(results, machine))
    print(f"JSON: {path}\n{(time.time() - started) / 60:.1f} minutes")
    return int(any(result.wrong for result in results))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Proves and times fused_attention on this machine's GPU.")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in (*STEPS, *OPTIONAL)], metavar="NAME", help="these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER", help="where <machine>/gpu.json goes")
    parser.add_argument("--rehearse", metavar="BACKEND", help="small problems of this backend on the CPU, to try the run itself")
    return parser.parse_args(arguments)


def _link_sources() -> Path:
    """A folder for PYTHONPATH in which the package lies as an installation would lay it; nothing is built or copied."""
    site = WORK / "site"
    package = site / "fused_attention"
    shutil.rmtree(site, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "python" / "fused_attention").iterdir(), ROOT / "benchmarks", ROOT / "triton_kernels"):
        if source.exists() and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return site


def _link_cuda(site: Path) -> None:
    """The CUDA kernels, once a step has compiled them and if no installation had them: the benchmark races them too."""
    for library in (WORK / "cuda").glob("_cuda.*.so"):
        if not (link := site / "fused_attention" / library.name).exists():
            link.symlink_to(library)


def _environment(site: Path, rehearse: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(WORK / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "cache" / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there is a process for each core already
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        **({"FUSED_ATTENTION_REHEARSE": rehearse} if rehearse else {}),
        **({"TRITON_INTERPRET": "1"} if rehearse == "triton" else {}),
    }


def _jobs(step: Step, environment: dict[str, str]) -> list[Job]:
    jobs = []
    records = WORK / "records" / step.name
    records.mkdir()
    until = str(time.time() + step.seconds - LAST_SECONDS)
    for number in range(step.processes):
        record = records / f"{number}.jsonl"
        command = [sys.executable, *step.command]
        if step.command[1].endswith((".device", ".experiments")):
            command += ["--record", str(record), "--until", until]
        variables = {"GPU_RUN_RECORD": str(record), "GPU_RUN_UNTIL": until, "FUSED_ATTENTION_GPU_BACKEND": step.backend}
        jobs.append(
            Job(step.name, command, environment | variables, ROOT, WORK / "logs" / f"{step.name}-{number}.log", record, step.patience)
        )
    return jobs


def _machine() -> dict[str, object] | None:
    log = WORK / "logs" / "machine-0.log"
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")] if log.exists() else []
    return json.loads(lines[-1]) if lines else None


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else f"{log} was not written"


def _table(environment: dict[str, str]) -> str:
    """The benchmark's own table, which needs the package."""
    record = WORK / "records" / BENCHMARK / "0.jsonl"
    if not record.exists():
        return ""
    command = [sys.executable, "-m", "fused_attention.benchmarks.device_report", str(record)]
    try:
        made = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=REPORT_SECONDS)
    except subprocess.TimeoutExpired as late:
        return str(late)
    return made.stdout or made.stderr


def _write(results: list[StepResult], machine: dict[str, object], out: Path) -> Path:
    path = out / folder_name(machine) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, "environment": machine, "steps": {result.name: result.as_json() for result in results}}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
