"""The tutorial's code runs as printed, and the pages that the documentation site generates are whole."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.M | re.S)
    assert len(code) == 6
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    out = capsys.readouterr().out
    ndcg = {name: float(value) for name, value in re.findall(r"^(\S+) +NDCG@10 ([\d.]+)", out, re.M)}
    assert len(ndcg) == 3
    assert ndcg.pop("model") > ndcg["popularity"]
    assert (tmp_path / "tutorial/model.safetensors").exists()


def test_links_of_pages_from_elsewhere_lead_to_the_same_files():
    pytest.importorskip("mkdocs")
    from scripts.docs_site import from_docs

    assert from_docs("[a](docs/data.md#x) [b](LICENSE) [c](https://e.org) ![d](docs/img/e.png)", "README.md") == (
        "[a](data.md#x) [b](LICENSE) [c](https://e.org) ![d](img/e.png)"
    )
    assert from_docs("[a](../docs/data.md)", "examples/smollm2.md") == "[a](../data.md)"


def test_docstrings_become_markdown_with_sections():
    pytest.importorskip("griffe")
    from scripts.docs_docstrings import as_markdown

    text = "See :class:`~flr.X` and ``y``.\n\nExample:\n    >>> 1\n    1"
    assert as_markdown(text) == "See `~flr.X` and `y`.\n\nExamples:\n    >>> 1\n    1".replace("~", "")
    assert as_markdown("Words.\n\n>>> f(1)\n1\n>>> f(2)\n2\n\nMore.").endswith(
        "Examples:\n    >>> f(1)\n    1\n    >>> f(2)\n    2\n\nMore."
    )
