"""docs/models.md says what is true: its code runs, its links lead somewhere, and it names every example."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_code_runs(capsys):
    torch.manual_seed(0)
    names: dict[str, torch.Tensor] = {}
    for code in CODE:
        exec(code, names)  # the page's own text, in this repository
    written = [eval(line) for line in capsys.readouterr().out.splitlines()]
    assert torch.tensor(written).T.equal(names["greedy"])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


def test_every_example_is_named():
    folder = ROOT / "python" / "fused_attention" / "examples"
    examples = {path.stem for path in folder.glob("*.py") if "def main(" in path.read_text()}
    assert examples == set(re.findall(r"^\| `(\w+)", PAGE.read_text().split("## Examples")[1], flags=re.MULTILINE))
