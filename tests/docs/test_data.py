"""The examples of docs/data.md run as printed."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/data.md"


def test_the_examples_run():
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False)
    assert attempted >= 15
    assert failed == 0
