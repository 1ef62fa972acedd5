"""Measurements in tables of README and docs stand in parts that scripts write from committed results."""

import re
from pathlib import Path

import pytest

from scripts import rl_held_back, rl_tables, scoring_table, sid_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGIN, END = re.compile(r"<!-- ([\w:-]+) -->"), re.compile(r"<!-- /[\w-]+ -->")
#: A decimal of three places or more, a factor, or a time or memory with its unit.
MEASURED = re.compile(r"(?<![\w.])[+-]?0?\.\d{3,}|\d×|\d (ms|µs|MB|GB)\b")
#: Rooms of marks (in "rl:planted" rl) and the test that their parts are fresh.
TESTED = {
    "architecture": "docs/test_architecture.py",
    "before-after": "docs/test_before_after.py",
    "bench": "bench/test_bench.py",
    "chaos": "docs/test_reliability.py",
    "engines": "docs/test_scale.py",
    "kernel": "docs/test_kernels.py",
    "length_grouping": "docs/test_length_grouping.py",
    "prompt_cache": "docs/test_prompt_cache.py",
    "quality": "docs/test_quality.py",
    "rl": "docs/test_tables.py",
    "scale": "docs/test_scale.py",
    "serving": "docs/test_scale.py",
    "sid_study": "docs/test_tables.py",
    "stream": "docs/test_quality.py",
    "study": "docs/test_study.py",
    "training": "docs/test_tables.py",
}


def typed(text: str) -> list[str]:
    """Rows of tables with measurements, outside the generated parts."""
    found, inside = [], False
    for line in text.splitlines():
        if END.fullmatch(line):
            inside = False
        elif BEGIN.fullmatch(line):
            inside = True
        elif not inside and line.startswith("|") and MEASURED.search(line):
            found.append(line)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_no_measurement_in_a_table_is_typed(page):
    assert typed(page.read_text()) == []


def test_a_typed_measurement_is_found():
    inside = "<!-- a:b -->\n| 0.123 |\n<!-- /a -->\n"
    assert typed(inside) == []
    for cell in (".0123", "-0.0012", "19.3×", "344 ms", "59 MB"):
        assert typed(f"{inside}| x | {cell} |\nout of a table {cell}") == [f"| x | {cell} |"]
    assert typed("| torch 2.13 | 0.1.2 | `--rate` 0.05 | [a.md](a.md#b.123) |") == []


def test_every_generated_part_is_tested():
    rooms = {mark.split(":")[0] for page in PAGES for mark in BEGIN.findall(page.read_text())}
    assert rooms == set(TESTED)
    for file in TESTED.values():
        assert (ROOT / "tests" / file).is_file(), file


@pytest.mark.parametrize(
    "script", [rl_held_back, rl_tables, scoring_table, sid_study], ids=lambda script: script.__name__
)
def test_tables_are_of_the_committed_results(script):
    text = script.PAGE.read_text()
    assert script.page(text) == text, f"run python -m {script.__name__}"
