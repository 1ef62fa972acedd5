"""Measurements in README and docs stand in parts that scripts write from committed results; the running text agrees."""

import re
from pathlib import Path

import pytest

from scripts import matrix_table, rl_held_back, rl_tables, scoring_table, sid_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGIN, END = re.compile(r"<!-- ([\w:-]+) -->"), re.compile(r"<!-- /[\w-]+ -->")
#: A decimal of three places or more, a factor, or a time or memory with its unit.
MEASURED = re.compile(r"(?<![\w.])[+-]?0?\.\d{3,}|\d×|\d (ms|µs|MB|GB)\b")
#: How well something recommends, in running text: .0937, .44.
SAID = re.compile(r"(?<![\w.])\.\d{2,}\b")
#: Rooms of marks (in "rl:planted" rl) and the test that their parts are fresh.
TESTED = {
    "architecture": "docs/test_architecture.py",
    "before-after": "docs/test_before_after.py",
    "bench": "bench/test_bench.py",
    "chaos": "docs/test_reliability.py",
    "engines": "docs/test_scale.py",
    "installation": "docs/test_tables.py",
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


def unfounded(text: str, log: str) -> list[str]:
    """Figures of paragraphs that no generated part of the page has, rounded, nor the log where it is referred to."""
    parts = re.compile(r"<!-- [\w:-]+ -->.*?<!-- /[\w-]+ -->|^```.*?^```|^    [^\n]*$", re.DOTALL | re.MULTILINE)
    generated = [number for part in parts.findall(text) if part.startswith("<!--") for number in _numbers(part)]
    found = []
    for paragraph in re.split(r"\n\s*\n", parts.sub("\n\n", text)):
        known = generated + (_numbers(log) if "(log.md)" in paragraph else [])
        found += [
            figure for figure in SAID.findall(paragraph) if not any(_rounds_to(number, figure) for number in known)
        ]
    return found


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d*\.\d+", text)


def _rounds_to(number: str, figure: str) -> bool:
    places = len(figure) - 1
    return len(number.split(".")[1]) >= places and abs(float(number) - float(figure)) <= 0.50001 * 10**-places


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_what_is_said_of_measurements_is_in_the_page_or_in_the_log(page):
    assert unfounded(page.read_text(), (ROOT / "docs/log.md").read_text()) == []


def test_a_figure_from_nowhere_is_found():
    part, log = "<!-- a:b -->\n| 0.09374 |\n<!-- /a -->\n", "it has .0815"
    assert unfounded(f"{part}It reaches .0937, which is .094.", log) == []
    assert unfounded(f"{part}It reaches .0938.\n\n    x = .123\n", log) == [".0938"]
    assert unfounded(f"{part}It reaches .0815.\n\n([log.md](log.md))", log) == [".0815"]
    assert unfounded(f"{part}It reaches .0815 ([log.md](log.md)).", log) == []


def test_every_generated_part_is_tested():
    rooms = {mark.split(":")[0] for page in PAGES for mark in BEGIN.findall(page.read_text())}
    assert rooms == set(TESTED)
    for file in TESTED.values():
        assert (ROOT / "tests" / file).is_file(), file


@pytest.mark.parametrize(
    "script", [matrix_table, rl_held_back, rl_tables, scoring_table, sid_study], ids=lambda script: script.__name__
)
def test_tables_are_of_the_committed_results(script):
    text = script.PAGE.read_text()
    assert script.page(text) == text, f"run python -m {script.__name__}"
