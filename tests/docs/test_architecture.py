"""The files and functions that docs/architecture.md names exist, and so do the files that any document names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "flr|flr_kernels|csrc|bench|scripts|tests|examples|docs"
#: ``path`` or ``path: name, name``, as it stands between backticks.
REFERENCE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)(?:: ([\w., ]+))?`")
#: A path anywhere in a text; ``*`` stands for any file.
NAMED = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*[\w*]\.(?:py|md|json|yaml|svg|sh|cu|cuh|cpp|h|html))\b")


def names(path: Path) -> set[str]:
    """What a module defines: functions, classes, constants, and ``Class.member``."""
    found = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef) and not prefix:
                collect(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text()).body, "")
    return found


def missing(text: str, root: Path = ROOT) -> list[str]:
    """The references of a text that lead nowhere."""
    lost = []
    for place, wanted in REFERENCE.findall(text):
        path = root / place
        if not path.exists():
            lost.append(place)
        elif wanted and path.suffix == ".py":
            lost += [f"{place}: {name}" for name in wanted.split(", ") if name not in names(path)]
        elif wanted:
            lost += [f"{place}: {name}" for name in wanted.split(", ") if name not in path.read_text()]
    return lost


def test_files_and_functions_of_the_page_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    assert len(REFERENCE.findall(text)) > 40
    assert missing(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_document_names_exist(page):
    lost = [path for path in NAMED.findall(page.read_text()) if not list(ROOT.glob(path))]
    assert lost == [], f"{page.name} names files that are not there"


def test_a_wrong_reference_is_found(tmp_path):
    (tmp_path / "flr").mkdir()
    (tmp_path / "flr/a.py").write_text("B: int = 1\nC = 2\nclass D:\n    e: int\n    def f(self): ...\ndef g(): ...\n")
    assert missing("`flr/a.py`, `flr/a.py: B, C, D, D.e, D.f, g` and `flr/`", tmp_path) == []
    text = "`flr/b.py: g`, `flr/a.py: h`, `flr/a.py: D.g, f`"
    assert missing(text, tmp_path) == ["flr/b.py", "flr/a.py: h", "flr/a.py: D.g", "flr/a.py: f"]
    assert NAMED.findall("see flr/a.py, (docs/b.md) and wt/flr/c.py or flr.d") == ["flr/a.py", "docs/b.md"]
