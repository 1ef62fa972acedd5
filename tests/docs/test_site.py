"""The tutorial says what it shows, and the pages that the documentation site generates are whole."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


_NUMBER = re.compile(r"-?\d+\.\d*")
_TITLE = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+ \d+")


def said(cell):
    """Words and numbers of a cell's output. Of items that are nearly as likely another machine may choose another."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return " ".join(_TITLE.sub("TITLE", _NUMBER.sub("#", text)).split()), [float(x) for x in _NUMBER.findall(text)]


def test_the_tutorial_says_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    from scripts.tutorial import NOTEBOOK, executed

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    again = executed(tmp_path)
    assert sum(cell.cell_type == "code" for cell in stored.cells) == 7
    for old, new in zip(stored.cells, again.cells, strict=True):
        if old.cell_type == "code":
            assert old.outputs, f"no output is shown of: {old.source}"
            assert said(old)[0] == said(new)[0], "run python scripts/tutorial.py"
            assert said(new)[1] == pytest.approx(said(old)[1], abs=0.05, rel=0.1), "run python scripts/tutorial.py"
    text = "".join(output.text for cell in again.cells for output in cell.get("outputs", ()))
    ndcg = {name: float(value) for name, value in re.findall(r"^(\S+) +NDCG@10 ([\d.]+)", text, re.M)}
    assert set(ndcg) == {"model", "popularity", "item-kNN"}
    assert ndcg["model"] > ndcg["popularity"]
    assert (tmp_path / "tutorial/model.safetensors").exists()


def test_a_notebook_is_a_page_with_its_outputs():
    pytest.importorskip("mkdocs")
    pytest.importorskip("nbconvert")
    from scripts.docs_site import notebook

    page = notebook(ROOT / "docs/tutorial.ipynb")
    assert page.startswith("# A tutorial\n\n[Download this notebook](tutorial.ipynb).\n")
    assert re.search(r"^    model +NDCG@10 0\.\d+", page, re.M)
    assert "(examples/smollm2.md)" in page


def test_the_picture_of_the_page_is_of_this_page():
    pytest.importorskip("PIL")
    from PIL import Image

    from scripts.screenshot import KEY, PICTURE, digest

    with Image.open(PICTURE) as picture:
        assert picture.info[KEY] == digest(), "run python scripts/screenshot.py --model FOLDER"
    assert PICTURE.stat().st_size < 100_000


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
