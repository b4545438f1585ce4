"""The README says what is true: its support table is what the backends answer, its examples run."""

import re
from pathlib import Path

import pytest
from fused_attention.benchmarks import summary

from fused_attention.testing import support

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_support_table_is_what_the_backends_answer():
    text = README.read_text()
    found = re.search(r"<!-- support table.*?-->\n(.*?)\n<!-- end of support table -->", text, flags=re.DOTALL)
    assert found is not None
    assert found.group(1) == support.table(), "regenerate it: python -m fused_attention.testing.support"


def test_the_benchmark_table_is_that_of_the_evidence():
    text = README.read_text()
    command, found = re.findall(r"<!-- benchmark table: (.*?) -->\n(.*?)\n<!-- end of benchmark table -->", text, flags=re.DOTALL)[0]
    assert found == summary.table(README.parent / command.split()[-1]), f"regenerate it: {command}"


@pytest.mark.parametrize("number", [0, 1])
def test_examples_run(number):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec("import torch\n" + examples[number], {})  # the README's own text, in this repository


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
