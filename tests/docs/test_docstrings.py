"""Examples in docstrings run as printed."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["evaluate.metrics", "evaluate.baselines", "data.trie", "decode.beam"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"flr.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
