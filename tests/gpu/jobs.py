"""Processes side by side, each with a limit: one that crashes, loses the device or hangs is started again while it gets any further."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

DONE = (0, 1, 5)  # exit statuses of a process that went through its list: all well, failures, pytest with nothing left to do
GRACE = 10.0  # beyond its limit a process may end what it is doing
MOST_STARTS = 12
POLL = 0.2


@dataclass
class Job:
    """One process of a step; its record grows by a line whenever something begins or ends."""

    step: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    record: Path
    patience: float  # seconds without a line in the record before it counts as hanging
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    active: float = 0.0  # when it was last seen to do something
    recorded: int = field(default=0)  # bytes of the record at its start

    def start(self) -> None:
        self.starts += 1
        self.active, self.recorded = time.time(), self._size()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def running(self, limit: float) -> bool:
        """Whether it still works; a process that hangs, or is past its limit, is ended."""
        if self.process is None or self.process.poll() is not None:
            return False
        if self.record.exists():
            self.active = max(self.active, self.record.stat().st_mtime)
        if time.time() > min(limit + GRACE, self.active + self.patience):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the compilers it started end too
            self.process.wait()
            return False
        return True

    def unfinished(self) -> bool:
        """Whether another start would get further than the last did."""
        code = None if self.process is None else self.process.returncode
        return code not in DONE and self.starts < MOST_STARTS and self._size() > self.recorded

    def _size(self) -> int:
        return self.record.stat().st_size if self.record.exists() else 0


def run_together(jobs: list[Job], limits: dict[str, float], width: int) -> dict[str, float]:
    """Runs the jobs in their order, at most `width` at a time, each until the limit of its step; the seconds each step took."""
    begun: dict[str, float] = {}
    seconds = dict.fromkeys(limits, 0.0)
    waiting, working = list(jobs), list[Job]()
    while waiting or working:
        for job in working[:]:
            if job.running(limits[job.step]):
                continue
            working.remove(job)
            seconds[job.step] = time.time() - begun[job.step]
            if job.unfinished() and time.time() < limits[job.step]:
                waiting.insert(0, job)
        while waiting and len(working) < width:
            job = waiting.pop(0)
            if time.time() < limits[job.step]:
                begun.setdefault(job.step, time.time())
                job.start()
                working.append(job)
        time.sleep(POLL)
    return seconds
