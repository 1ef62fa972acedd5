"""What importing the package brings with it, and what waits: names for their first use, callbacks for an import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

from flr import lazy
from flr.lazy import when_imported

HEAVY = (
    "accelerate", "datasets", "fastapi", "flr_kernels", "matplotlib", "numpy", "pandas", "peft", "pyarrow", "rich",
    "scipy", "sklearn", "tensorboard", "torch", "transformers", "triton", "yaml",
)  # fmt: skip
WITH_TRANSFORMERS = {"numpy", "rich", "transformers", "yaml"}
PACKAGES = ("flr", "flr.serve", "flr.train")


def heavy_modules(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has imported after ``code``."""
    code = f"import sys, json\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def run_command(*words: str) -> str:
    return f"from flr.cli import main\ntry: main({list(words)!r})\nexcept SystemExit: pass"


def test_the_list_of_heavy_modules_finds_them():
    assert {"numpy", "torch", "flr_kernels"} <= heavy_modules("import flr; flr.FLRConfig, flr.patch_model")


@pytest.mark.parametrize(
    "code",
    ["import flr", "import flr; dir(flr); flr.FLRConfig", run_command(), run_command("--help"), run_command("-V")],
)
def test_nothing_heavy_is_imported(code):
    assert heavy_modules(code) == set()


@pytest.mark.parametrize("command", ["quickstart", "prepare", "evaluate", "recommend", "explain", "serve"])
def test_help_imports_the_parser_alone(command):
    assert heavy_modules(run_command(command, "--help")) <= WITH_TRANSFORMERS


def test_help_of_the_benchmarks_imports_less():
    assert heavy_modules(run_command("bench", "--help")) <= {"rich"}


def test_help_of_a_training_leaves_the_trainers_out():
    code = run_command("sft", "--help") + "\nassert 'flr.train.arguments' in sys.modules"
    heavy_modules(code + "\nassert not {'flr.train.sft', 'flr.train.grpo', 'flr.recommend'} & set(sys.modules)")


def test_a_server_or_worker_that_starts_leaves_statistics_out():
    found = heavy_modules("import flr.recommend") & {"datasets", "pandas", "sklearn"}
    assert not found or found <= heavy_modules("from transformers import GenerationMixin")  # 5.17 itself brings two


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_and_type_checkers_see_the_same(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(str(package.__file__)).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(seen) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for public, module in seen.items():
        assert getattr(package, public) is getattr(importlib.import_module(f"{name}.{module}"), public)


def test_other_names_raise_as_usual():
    import flr

    with pytest.raises(AttributeError, match="module 'flr' has no attribute 'patch_modle'"):
        _ = flr.patch_modle
    with pytest.raises(ImportError, match="cannot import name 'patch_modle' from 'flr'"):
        from flr import patch_modle  # noqa: F401
    assert not hasattr(flr, "__wrapped__")


def test_modules_of_the_package_are_found_without_an_import_of_their_own():
    code = (
        "import flr\nassert flr.data.load_dataset and flr.recommend.Recommender is flr.Recommender\nfrom flr import *"
    )
    heavy_modules(code + "\npatch_model, FLRConfig")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A package that nobody has imported; its name."""
    folder = tmp_path / "awaited"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("LOADER = __spec__.loader\nvalue = 1\n")
    (folder / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    path, waiting = list(sys.meta_path), dict(lazy._FINDER.waiting)
    yield "awaited.inner"
    sys.meta_path[:] = path
    lazy._FINDER.waiting = waiting
    for name in [name for name in sys.modules if name.split(".")[0] == "awaited"]:
        del sys.modules[name]


def test_callbacks_run_after_the_import_once_and_in_order(module):
    calls = []
    when_imported(module, lambda found: calls.append(("first", found.value)))
    when_imported(module, lambda found: calls.append(("second", found.value)))
    importlib.import_module("awaited.other")
    assert calls == []
    found = importlib.import_module(module)
    assert calls == [("first", 1), ("second", 1)]
    when_imported(module, lambda found: calls.append(("third", found.value)))
    assert calls[2:] == [("third", 1)]
    importlib.reload(found)
    assert len(calls) == 3


def test_an_awaited_module_is_like_any_other(module):
    importlib.import_module("awaited.other")
    usual = type(sys.modules["awaited.other"].__loader__)
    when_imported(module, lambda found: None)
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert "value = 1" in spec.loader.get_source(module)  # found, not run
    assert module not in sys.modules
    found = importlib.import_module(module)
    assert {type(x) for x in (found.LOADER, found.__loader__, found.__spec__.loader)} == {usual}
    assert "value = 1" in inspect.getsource(found)
    assert lazy._FINDER not in sys.meta_path  # nothing waits


def test_a_module_that_puts_another_object_in_its_place(module, tmp_path):
    (tmp_path / "awaited" / "inner.py").write_text(
        "import sys, types\nnew = types.ModuleType(__name__)\nnew.value = 2\nsys.modules[__name__] = new\n"
    )
    values = []
    when_imported(module, lambda found: values.append(found.value))
    importlib.import_module(module)
    assert values == [2]


def test_a_failed_import_is_as_it_was_and_the_callback_waits_on(module, tmp_path):
    source = tmp_path / "awaited" / "inner.py"
    source.write_text("def f():\n    raise ZeroDivisionError('of its own')\nf()\n")
    calls = []
    when_imported(module, lambda found: calls.append(found.value))
    with pytest.raises(ZeroDivisionError, match="of its own") as caught:
        importlib.import_module(module)
    assert [frame.name for frame in traceback.extract_tb(caught.tb)][-2:] == ["<module>", "f"]
    assert module not in sys.modules
    source.write_text("value = 12\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert calls == [12]


def test_a_callback_that_fails_breaks_no_import(module):
    calls = []

    def broken(found):
        raise KeyError("why")

    when_imported(module, broken)
    when_imported(module, lambda found: calls.append(1))
    with pytest.warns(RuntimeWarning, match="broken: expected to run after the import of awaited.inner, got KeyError"):
        importlib.import_module(module)
    assert calls == [1]


def test_what_is_absent_stays_absent(module):
    when_imported("awaited.nowhere", lambda found: None)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'awaited.nowhere'"):
        importlib.import_module("awaited.nowhere")


@pytest.mark.parametrize("order", ["flr first", "transformers first"])
def test_transformers_may_be_imported_before_or_after(order):
    name = "transformers.models.auto.configuration_auto"
    wait = f"from flr.lazy import when_imported; when_imported({name!r}, lambda m: print(m.AutoConfig.__name__))"
    use = "from transformers import AutoConfig"
    code = "; ".join([wait, use] if order == "flr first" else [use, wait])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "AutoConfig\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "transformers" not in heavy_modules(wait)
