"""A user's mistakes: each is one line that says what was expected, never a traceback."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import subprocess
import sys

import pytest

from flr.cli import main
from flr.cli.errors import message
from tests.cli.test_cli import SMALL

TINY = [*SMALL, "--num_train_epochs", "1", "--disable_tqdm", "true"]
DATA = SMALL[:4]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where the table's words in braces lead: a trained folder, one of an encoder, a plain file, files for --config."""
    from transformers import BertConfig, BertModel

    from flr.data import build_tokenizer, planted_dataset

    root = tmp_path_factory.mktemp("mistakes")
    assert main(["sft", *TINY, "--output_dir", str(root / "run")]) == 0
    tokenizer = build_tokenizer(planted_dataset(num_items=60, num_users=150).catalogue, "id")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    (root / "file").write_text("text\n")
    (root / "syntax.yaml").write_text("num_factors: 2\nreport_to: [a\nhidden_size: 3\n")
    (root / "value.yaml").write_text("num_factors: 2\nhidden_size: wide\n")
    return {"root": root, **{name: root / name for name in ("run", "bert", "file", "out")}}


# (command line, what standard error says after "flr COMMAND: "); {out} is no folder yet
MISTAKES = [
    # flags
    ("sft --learning_rate fast", "learning_rate: expected a number, got 'fast'"),
    ("sft --learning_rate", "learning_rate: expected a number, got none"),
    ("sft --num_factors 2.5", "num_factors: expected an integer, got '2.5'"),
    ("sft --tie_word_embeddings maybe", "tie_word_embeddings: expected true or false, got maybe"),
    ("sft --optim best", "optim: expected one of adamw_torch,"),
    ("sft --learning_rat 1", "expected options of flr sft, got --learning_rat; did you mean --learning_rate?"),
    ("evaluate words", "expected options of flr evaluate, got words"),
    ("sft --json=yes", "json: expected ignored explicit argument 'yes'"),
    # --config
    ("sft --config {root}/syntax.yaml", "{root}/syntax.yaml:3: expected YAML, got expected ',' or ']'"),
    ("sft --config {root}/value.yaml", "{root}/value.yaml:2: hidden_size: expected an integer, got 'wide'"),
    ("sft --config {root}/absent.yaml", "config: expected a YAML file, got nothing at {root}/absent.yaml"),
    # models
    ("sft TINY --hidden_size 30", "architecture: expected sizes that llama can be built with, got hidden_size 30"),
    ("sft TINY --hidden_size 30 --architecture gpt2", "architecture: expected sizes that gpt2 can be built with, got "),
    ("sft TINY --hidden_size 0", "hidden_size: expected an integer >= 1, got 0"),
    ("sft TINY --num_hidden_layers -1", "num_hidden_layers: expected an integer >= 1, got -1"),
    ("sft TINY --num_attention_heads 0", "num_attention_heads: expected an integer >= 1, got 0"),
    ("sft TINY --attention_dropout 1", "attention_dropout: expected a number in [0, 1), got 1.0"),
    ("sft TINY --initializer_range 0", "initializer_range: expected a positive number, got 0.0"),
    ("sft TINY --init_items best", "init_items: expected one of random, title, text, mean, got 'best'"),
    ("sft TINY --init_items text", "init_items: expected random or title from scratch, got 'text'"),
    ("sft TINY --model {run} --init_items title", "init_items: expected text or mean with a model, got 'title'"),
    ("sft TINY --model {run} --init_items mean", "init_items: expected nothing with {run}, whose items it knows, got"),
    ("sft TINY --model {run} --factors_from_groups", "factors_from_groups: expected False with {run}, whose"),
    ("sft TINY --dtype int8", "dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
    ("sft TINY --dtype bfloat16", "dtype: expected float32 for a model from scratch, got 'bfloat16'"),
    ("sft TINY --model {run} --dtype float16", "dtype: expected float32 or bfloat16 for weights that are trained"),
    ("rl DATA --model {run} --output_dir {out} --dtype int8", "dtype: expected one of auto, float32"),
    ("sft TINY --attn_implementation fast", "attn_implementation: expected one of eager, sdpa, flex_attention"),
    ("sft TINY --attn_implementation flash_attention_2", "attn_implementation: expected the package flash-attn and"),
    ("evaluate DATA --model {run} --attn_implementation flash_attention_3", "attn_implementation: expected the"),
    ("serve --model {run} --attn_implementation fast", "attn_implementation: expected one of eager, sdpa"),
    ("sft TINY --lora_rank 2", "lora_rank: expected a pretrained --model beside it, got 2"),
    ("sft TINY --lora_rank -1", "lora_rank: expected an integer >= 0, got -1"),
    ("sft TINY --lora_alpha 2", "lora_alpha: expected a lora_rank beside it, got 2.0 alone"),
    # options without an effect
    ("sft TINY --teacher_weight 0.9", "teacher_weight: expected a teacher beside it, got 0.9 alone"),
    ("sft TINY --neighbour_temperature 2", "neighbour_temperature: expected augment_neighbour or catalogue_rows"),
    ("sft TINY --title_power 2", "title_power: expected init_items title beside it, got 2.0 alone"),
    ("sft TINY --revision main", "revision: expected a model on the Hub beside it, got 'main' alone"),
    ("sft TINY --model {run} --architecture gpt2", "architecture: expected 'llama', that of {run}, or nothing, got"),
    ("sft TINY --model {run} --hidden_size 48", "hidden_size: expected 32, that of {run}, or nothing, got 48"),
    ("sft TINY --prompt_cache_gb 2", "prompt_cache_gb: expected a prompt_cache beside it, got 2.0 alone"),
    ("sft TINY --compile_layers true --cuda_graphs false", "compile_layers: expected cuda_graphs beside it, got True"),
    ("rl DATA --model {run} --output_dir {out} --reward_beams 5", "reward_beams: expected a reward that decodes"),
    ("rl DATA --model {run} --output_dir {out} --backbone_learning_rate 1", "backbone_learning_rate: expected "),
    ("rl DATA --model {run} --output_dir {out} --advantage_from_clean false", "advantage_from_clean: expected "),
    ("sft TINY --model {run} --lora_rank 2 --lora_targets q", "lora_targets: expected all-linear, or of down_proj"),
    ("sft TINY --model {run} --lora_rank 2 --freeze_backbone", "freeze_backbone: expected False beside lora_rank"),
    ("sft TINY --model {run} --load_in_4bit", "load_in_4bit: expected a lora_rank beside it, since packed weights"),
    ("sft TINY --model {run} --load_in_4bit --gguf_file x.gguf", "load_in_4bit: expected a model in safetensors, got"),
    ("sft TINY --model {run} --gguf_file ../x.gguf", "gguf_file: expected the name of a .gguf file in the model's"),
    ("sft TINY --model {run} --gguf_file x.gguf", "gguf_file: expected a .gguf file in {run}, got 'x.gguf'"),
    ("merge {run} --output {out}", "model: expected the folder of an adapter, with adapter_config.json, got {run}"),
    ("sft TINY --architecture lama", "architecture: expected the model type of a causal LM, such as"),
    ("sft TINY --architecture t5", "architecture: expected the model type of a causal LM, such as"),
    ("sft TINY --architecture bert", "architecture: expected a causal LM, got bert, an encoder"),
    ("sft TINY --model {bert}", "model: expected a causal LM, got {bert}, an encoder"),
    ("rl DATA --model {bert} --output_dir {out}", "directory: expected a patched model's config.json"),
    ("evaluate DATA --model {root}/absent", "directory: expected a folder with config.json or a model on the Hub, got"),
    # data
    ("sft TINY --data {root}/absent", "path: expected a folder or a file, got nothing at {root}/absent"),
    ("evaluate --planted_items 70 --planted_users 150 --model {run}", "data: expected the catalogue that {run} was"),
    ("sft TINY --catalogue_rows -1", "catalogue_rows: expected an integer >= 0, got -1"),
    ("sft TINY --teacher ease", "teacher: expected one of none, auto, linear, item-knn, got 'ease'"),
    ("sft TINY --teacher_weight 0", "teacher_weight: expected a number in (0, 1], got 0.0"),
    ("sft TINY --teacher_temperature 0", "teacher_temperature: expected a positive number, got 0.0"),
    ("sft TINY --teacher auto --augment_neighbour 0.1", "teacher: expected None beside neighbours"),
    ("sft TINY --neighbour_temperature 0", "neighbour_temperature: expected a positive number, got 0.0"),
    ("sft TINY --views_weight 1.2", "views_weight: expected None or a number in [0, 1], got 1.2"),
    ("sft TINY --augment_drop_item nan", "augment_drop_item: expected a number in [0, 1], got nan"),
    ("sft TINY --orthogonality_weight nan", "orthogonality_weight: expected a number >= 0, got nan"),
    ("sft TINY --weight_decay -3", "weight_decay: expected a number >= 0, got -3.0"),
    ("evaluate DATA --model {run} --neighbours_weight 2", "neighbours_weight: expected None or a number in [0, 1]"),
    ("sids --data {root} --embed tfidf --embed_size 0", "embed_size: expected None or an integer >= 1, got 0"),
    ("prepare recbole", "source: expected a file or folder, got none"),
    # choices
    ("evaluate DATA --model {run} --split last", "split: expected train, valid or test, got 'last'"),
    ("compare TINY --split last", "split: expected valid or test, got 'last'"),
    (
        "compare TINY --modes best",
        "modes: expected some of none, anchor, latentr3, flr, flr-plain, flr-mixture, offsets, offsets-mixture, got "
        "'best'",
    ),
    ("sft TINY --variant anchor --aggregation mixture", "aggregation: expected thought for variant anchor"),
    ("recommend --model {run} --history item_1 --k 0", "k: expected an integer from 1 to 1000, got 0"),
    ("serve --model {run} --dtype int3", "dtype: expected one of float32, bfloat16, float16, float64, got 'int3'"),
    # the machine
    ("FLR_BACKEND=triton sft TINY", "triton backend: needs a CUDA tensor, got one on cpu"),
    ("FLR_BACKEND=best sft TINY", "FLR_BACKEND: expected auto, reference, triton"),
    ("sft TINY --output_dir {file}", "{file}: File exists"),
    ("bench compare {root}/a {root}/b --threshold nan", "threshold: expected a positive number, got nan"),
    ("bench compare {root}/absent.json {root}/absent.json", "{root}/absent.json: No such file or directory"),
]  # fmt: skip


def run(line: str, places: dict, monkeypatch) -> int:
    words = line.split()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    groups = {"TINY": [*TINY, "--output_dir", str(places["out"])], "DATA": DATA}
    return main([part for word in words for part in groups.get(word, [word.format(**places)])])


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line(line, expected, places, monkeypatch, capsys):
    status = run(line, places, monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    command = next(word for word in line.split() if "=" not in word)
    assert lines[-1].startswith(f"flr {command}: {expected.format(**places)}")
    assert status in (1, 2)
    assert not any("Traceback" in text or "shows the traceback" in text for text in lines)
    assert not places["out"].exists() or not (places["out"] / "model.safetensors").exists()


def test_the_status_tells_unusable_flags_from_refused_input(capsys):
    assert main(["sft", "--nonsense"]) == 2
    assert main(["sft", "--learning_rate", "x"]) == 2
    assert main(["sft", "--num_factors", "99"]) == 1


class Odd(Exception):
    pass


@pytest.fixture
def broken(monkeypatch):
    """``flr explain`` raises what it is told to."""

    def broken(error):
        def command(argv):
            raise error

        monkeypatch.setattr(importlib.import_module("flr.cli.explain"), "main", command)

    return broken


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Odd("one\ntwo"), "Odd: one two; flr --debug explain … shows the traceback"),
        (KeyError("name"), "KeyError: 'name'; flr --debug explain … shows the traceback"),
        (RuntimeError("x" * 900), f"RuntimeError: {'x' * 300}; flr --debug explain … shows the traceback"),
        (ImportError("cannot import name 'a' from 'b'", name="b"), "ImportError: cannot import name 'a' from 'b'; flr"),
        (ImportError("X requires the sentencepiece library"), "X requires the sentencepiece library"),
        (ModuleNotFoundError("…", name="peft"), 'this command needs peft: pip install "flr[peft]"'),
        (ModuleNotFoundError("…", name="matplotlib.figure"), 'this command needs matplotlib: pip install "flr[plots]"'),
        (ValueError("k: expected 1,\n  got 0"), "k: expected 1, got 0"),
        (ValueError(), "ValueError"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: expected room on its disk, got too"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the folder that is written to: expected"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_every_error_is_one_line(broken, capsys, error, text):
    broken(error)
    assert main(["explain"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"flr explain: {text}")
    assert message(error, "explain") == said.removeprefix("flr explain: ").rstrip("\n")


@pytest.mark.parametrize("words", [["--debug", "explain"], ["explain", "--debug"], ["explain", "--debug", "--k", "3"]])
def test_debug_shows_the_traceback(broken, words, capsys):
    broken(ValueError("k: expected 1, got 0"))
    with pytest.raises(ValueError, match="k: expected 1"):
        main(words)
    assert main([word for word in words if word != "--debug"]) == 1


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("0", False), ("", False)])
def test_debug_by_the_environment(broken, value, raises, monkeypatch, capsys):
    broken(Odd("odd"))
    monkeypatch.setenv("FLR_DEBUG", value)
    if raises:
        with pytest.raises(Odd):
            main(["explain"])
    else:
        assert main(["explain"]) == 1


def test_the_flag_of_transformers_is_left_to_it(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(importlib.import_module("flr.cli.sft"), "main", lambda argv: seen.append(argv))
    assert main(["sft", "--debug", "underflow_overflow"]) == 0
    assert main(["sft", "--seed", "1", "--debug"]) == 0
    assert seen == [["--debug", "underflow_overflow"], ["--seed", "1"]]


@pytest.mark.parametrize(
    "words", [["sft", "--learning_rate", "x"], ["recommend", "--model", "absent", "--history", "x"]]
)
def test_the_process_shows_no_traceback_either(words):
    code = "import sys; from flr.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"flr {words[0]}: ")


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from flr.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1)\n" + code, "bench", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()


@pytest.mark.parametrize("limit", [20_000, 60_000])  # reached by safetensors, by torch.save
def test_a_full_disk_is_one_line(tmp_path, limit):
    """A limit on the size of files stands for the disk: the same writes fail, with another number of the error."""
    code = "import sys; from flr.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "sft", *TINY, "--output_dir", str(tmp_path / "run")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"flr sft: {tmp_path / 'run'}")
    assert "expected to write it whole, got" in said
