"""What is said where matplotlib, an extra, is missing, and what goes on without it."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import pytest
from PIL import Image

from flr.cli import main
from flr.cli.quickstart import pictures
from flr.report.plots import compare_panels, plot_compare, summarise
from tests.helpers.extras import hide
from tests.helpers.models import build_recommender
from tests.helpers.serving import save

ROWS = [{"mode": "flr", "seed": 0, "metrics": {"hr@10": 0.2}}]
MESSAGE = r"pip install 'flr\[plots\]'"


@pytest.fixture(scope="module")
def explanation():
    return build_recommender().explain(["item_0", "item_1"], k=3)


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch, tmp_path, explanation):
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match=MESSAGE):
        explanation.heatmap(tmp_path / "heat.png")
    with pytest.raises(ImportError, match=MESSAGE):
        plot_compare(ROWS, tmp_path / "compare.png")
    explanation.html(tmp_path / "why.html")
    assert summarise(ROWS, "hr@10")[0].mean == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["why.html"]


def test_a_fault_inside_matplotlib_is_not_called_a_missing_extra(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing"):
        plot_compare(ROWS, tmp_path / "compare.png")


def test_commands_without_matplotlib(monkeypatch, tmp_path, capsys, explanation):
    hide(monkeypatch, "matplotlib")
    pictures(ROWS, explanation, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "pictures are left out, matplotlib is not installed: pip install 'flr[plots]'" in _text(capsys)
    assert main(["explain", "--history", "a", "--png", "heat.png"]) == 1
    assert "png: expected matplotlib for a picture, got none; pip install 'flr[plots]'" in _text(capsys)
    save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "--model", "model", "--history", "item_0", "item_1"]) == 0
    assert "pip install 'flr[plots]'" in _text(capsys)
    assert (tmp_path / "explanation.html").exists()
    assert not (tmp_path / "explanation.png").exists()


def test_pictures_with_matplotlib(tmp_path, explanation):
    pictures(ROWS, explanation, tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"compare.png", "attention.png"}
    assert all(content.startswith(b"\x89PNG") for content in made.values())


def test_a_pages_panels_have_a_dark_form():
    (panel,) = compare_panels(ROWS, ["hr@10", "mrr"])
    assert (panel["title"], panel["alt"]) == ("HR@10", "HR@10: flr 0.2000")
    corners = []
    for scheme in ("light", "dark"):
        with Image.open(io.BytesIO(base64.b64decode(panel[scheme].partition(",")[2]))) as picture:
            corners.append(picture.convert("RGB").getpixel((2, 2)))
    assert corners == [(255, 255, 255), (0x15, 0x18, 0x1B)]


def test_no_module_of_the_main_job_needs_an_extra():
    code = """
import importlib, pkgutil, sys
for name in ("matplotlib", "tensorboard", "fastapi", "uvicorn", "prometheus_client", "peft", "cut_cross_entropy"):
    sys.modules[name] = None
import flr, flr_kernels
from flr.cli import main
for package in (flr, flr_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.startswith(("flr.serve", "flr_kernels._C")) and "triton" not in module.name:
            importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _text(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())
