"""What the processes of a long run did: a line of JSON for whatever began and whatever ended, so that a crash costs one thing, not the run.

{"name": "...", "event": "began", "time": 1.7e9}
{"name": "...", "event": "ended", "time": 1.7e9, "outcome": "passed", ...facts}

Processes that share a list claim what they begin, in the folder `claims` beside their records: each thing is done once.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any


class Record:
    """One process's file, which others may read meanwhile; without a path nothing is kept and every claim is granted."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def claim(self, name: str) -> bool:
        """Whether it is this process's to do. What ended an earlier process stays claimed: it would end this one too."""
        if self._path is None:
            return True
        claims = self._path.parent / "claims"
        claims.mkdir(exist_ok=True)
        try:
            (claims / hashlib.sha256(name.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        self._append({"name": name, "event": "began"})
        return True

    def ended(self, name: str, outcome: str, **facts: Any) -> None:
        self._append({"name": name, "event": "ended", "outcome": outcome, **facts})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"time": time.time(), **entry}) + "\n")
