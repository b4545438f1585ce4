"""docs/modules.md says what is true: its example runs, its tests exist, and no deviation is missing from it."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "modules.md"


def names_of_tests():
    text = "\n".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


def test_every_test_it_names_exists_and_every_deviation_is_named():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named <= names_of_tests()
    assert {name for name in names_of_tests() if name.startswith("test_deviation_")} <= named


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(example, {})  # the page's own text, in this repository
    assert capsys.readouterr().out.startswith("replaced 12: encoder, encoder.layers.0,")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
