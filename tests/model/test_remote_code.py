"""No loader runs code that lies in a folder, whatever stands on standard input; and none forgets to say so."""

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import flr
from flr.cli import main
from flr.data import RecProcessor
from flr.data.saved_tokenizer import load_tokenizer
from tests.helpers.models import build_recommender, tiny_model

ROOT = Path(__file__).parents[2]
_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).write_text("run")
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
_MAPS = {
    "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
}


def _plant(folder, mark, **changes):
    """Code in ``folder`` that writes ``mark``, and an ``auto_map`` to it in each configuration, inner ones too."""
    (folder / "evil.py").write_text(_CODE.format(mark=str(mark)))
    for name, auto_map in _MAPS.items():
        values = json.loads((folder / name).read_text()) | {"auto_map": auto_map} | changes.get(name.split(".")[0], {})
        if isinstance(values.get("base_config"), dict):
            values["base_config"] |= {"auto_map": auto_map, "model_type": "evil"}
        (folder / name).write_text(json.dumps(values))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Folders of a patched and of a plain model with code in them; and the file that it would write."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    recommender, mark = build_recommender(), tmp_path / "mark"
    evil = {"config": {"model_type": "evil"}, "tokenizer_config": {"tokenizer_class": "EvilTokenizer"}}
    for name, model in (("patched", recommender.model), ("plain", tiny_model())):
        model.save_pretrained(tmp_path / name)
        recommender.processor.save_pretrained(tmp_path / name)
    _plant(tmp_path / "patched", mark)
    _plant(tmp_path / "plain", mark, **evil)
    return tmp_path, mark


def test_the_planted_code_would_run(planted):
    folder, mark = planted
    AutoModelForCausalLM.from_pretrained(folder / "plain")  # asks, and reads y
    assert mark.exists()


@pytest.mark.parametrize("kind", ["patched", "plain"])
def test_no_code_of_a_folder_is_run(planted, kind, capsys):
    folder, mark = planted[0] / kind, planted[1]
    for load in (flr.from_pretrained, flr.load_latentr3, flr.Recommender.from_pretrained):
        with pytest.raises((ValueError, OSError)):
            load(folder)
    with contextlib.suppress(ValueError):  # the patched folder's own class is one of transformers
        load_tokenizer(folder)
    RecProcessor.from_pretrained(folder)  # its own file says which class reads the tokenizer
    for command in ("sft", "rl", "evaluate"):
        extra = [] if command == "evaluate" else ["--output_dir", str(folder / "out"), "--use_cpu", "true"]
        assert main([command, "--model", str(folder), "--planted_items", "40", "--planted_users", "30", *extra]) == 1
    for command in ("recommend", "explain"):
        assert main([command, "--model", str(folder), "--history", "item_1"]) == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "pipeline", "LlamaForCausalLM", 7])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "processor_config.json"])
def test_a_tokenizers_class_is_one_of_tokenizers(tmp_path, name, file):
    recommender = build_recommender()
    recommender.model.save_pretrained(tmp_path)
    recommender.processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(values | {"tokenizer_class": name}))
    with pytest.raises(ValueError, match=r"tokenizer_class: expected a (tokenizer class of transformers|name), got"):
        RecProcessor.from_pretrained(tmp_path)


#: Loaders of ours, which take no such option or refuse it, and PEFT's, which runs no code of a folder.
_OURS = {"RecProcessor", "Recommender", "flr", "peft.PeftConfig", "peft.PeftModel"}


def _unsafe(source):
    """Lines of calls that load something of transformers without saying ``trust_remote_code=False``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        called = isinstance(function, ast.Attribute) and function.attr in ("from_pretrained", "from_config")
        pipelined = ast.unparse(function).split(".")[-1] == "pipeline"
        if not pipelined and not (called and ast.unparse(function.value) not in _OURS):
            continue
        said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
        if not (said and isinstance(said[0], ast.Constant) and said[0].value is False):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", ["flr", "scripts", "bench"])
def test_every_loader_says_that_no_code_is_trusted(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): lines for file in files if (lines := _unsafe(file.read_text()))}
    assert not found


def test_a_loader_that_does_not_say_so_is_found():
    assert _unsafe("AutoModel.from_pretrained(x)") == [1]
    assert _unsafe("t.AutoConfig.from_pretrained(x, trust_remote_code=trust)") == [1]
    assert _unsafe("AutoModel.from_config(x, trust_remote_code=True)\npipeline('t', model=x)") == [1, 2]
    assert _unsafe("AutoModel.from_pretrained(x, trust_remote_code=False)\nRecommender.from_pretrained(x)") == []
