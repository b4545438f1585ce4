"""docs/caches.md says what is true: its examples run and print what they say, and the methods of its tables exist."""

import re
from pathlib import Path

import pytest

from fused_attention import KVCache, PagedKVCache

PAGE = Path(__file__).resolve().parents[1] / "docs" / "caches.md"


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_prints_what_it_says(number, capsys):
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[number]
    exec(example, {})  # the page's own text, in this repository
    said = re.search(r"^print\(.*\)  # ([^:\n]*?\)|\d+)", example, flags=re.MULTILINE)
    assert said is not None
    assert capsys.readouterr().out.strip() == said.group(1)


def test_the_tables_name_what_there_is():
    sections = PAGE.read_text().split("\n## ")
    for cache in (KVCache(1, 1, 1, 1), PagedKVCache(1, 1, 1, 1)):
        (section,) = (each for each in sections if each.startswith(type(cache).__name__))
        first_cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
        names = set(re.findall(r"(?:^|, )`(\w+)", "\n".join(first_cells), flags=re.MULTILINE)) - {"attention_with_cache"}
        assert len(names) >= 5
        assert not {name for name in names if not hasattr(cache, name)}
