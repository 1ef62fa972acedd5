"""``--config``: what a YAML file's values become, and what is said about a wrong one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from flr.cli import main
from flr.cli.config_file import MAX_BYTES
from flr.cli.parsing import parse
from flr.config import option


@dataclass
class Options:
    """One option of each kind that TrainingArguments has."""

    rate: float = option(0.1, "A number.")
    steps: int = option(1, "An integer.")
    flag: bool = option(False, "A truth value.")
    on: bool = option(True, "A truth value.")
    name: str = option("x", "A text.")
    strategy: Literal["no", "epoch"] = option("epoch", "A choice.")
    limit: int | None = option(None, "An integer or nothing.")
    score: float | None = option(1.0, "A number or nothing.")
    words: list[str] = option(["a"], "Texts.")
    sizes: list[int] = field(default_factory=list)
    report: None | str | list[str] = option("all", "A text or texts.")  # noqa: RUF036
    extra: dict[str, Any] | str | None = option(None, "A mapping.")


@pytest.fixture
def read(tmp_path):
    def read(text, *words):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse("try", "", (Options,), ["--config", str(path), *words])[0]

    return read


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("strategy: no", "strategy", "no"),  # YAML 1.1 reads False
        ("name: no", "name", "no"),
        ("name: on", "name", "on"),
        ("name: 007", "name", "007"),
        ("name: 2024-01-01", "name", "2024-01-01"),
        ("name: 12:30", "name", "12:30"),
        ("name: true", "name", "true"),
        ("name: 'null'", "name", "null"),
        ("name: 'a\n  b'", "name", "a b"),
        ("rate: 1e-5", "rate", 1e-5),  # YAML 1.1 reads a text
        ("rate: 3", "rate", 3.0),
        ("rate: '1e-5'", "rate", 1e-5),
        ("steps: 12", "steps", 12),
        ("flag: yes", "flag", True),
        ("flag: true", "flag", True),
        ("on: no", "on", False),
        ("on: off", "on", ValueError),
        ("limit: null", "limit", None),
        ("limit:", "limit", None),
        ("limit: 3", "limit", 3),
        ("score: ~", "score", None),
        ("words: [no, 1e-5, 007]", "words", ["no", "1e-5", "007"]),
        ("words:\n- a b\n- '-c'", "words", ["a b", "-c"]),
        ("words: single", "words", ["single"]),
        ("words: []", "words", []),
        ("sizes: [1, 2]", "sizes", [1, 2]),
        ("report: [one, two]", "report", ["one", "two"]),
        ("report: one", "report", "one"),
        (
            "extra: {a: 1e-5, b: no, c: 010, d: 0x10, e: 0o10}",
            "extra",
            {"a": 1e-5, "b": "no", "c": 10, "d": 16, "e": 8},
        ),
        ("extra: {a: [1.5, true, null, -.inf]}", "extra", {"a": [1.5, True, None, float("-inf")]}),
        ("extra: {a: 1_000, b: 1:30, c: +3, d: .5}", "extra", {"a": "1_000", "b": "1:30", "c": 3, "d": 0.5}),
        ("extra: '{\"a\": 1}'", "extra", '{"a": 1}'),
        ("", "rate", 0.1),
        ("# nothing\n", "rate", 0.1),
    ],
)
def test_a_value_is_what_its_flag_reads(read, text, name, value):
    if value is ValueError:
        with pytest.raises(ValueError, match=f"run.yaml:1: {name}: expected true or false, got 'off'"):
            read(text)
    else:
        found = getattr(read(text), name)
        assert found == value
        assert type(found) is type(value)


def test_flags_win_and_defaults_stay(read):
    options = read("rate: 2\nwords: [x]\non: false\n", "--rate", "3", "--words", "y", "z")
    assert (options.rate, options.words, options.on, options.name) == (3.0, ["y", "z"], False, "x")
    assert read("flag: true", "--flag", "false").flag is False
    assert read("extra: {a: 1}", "--extra", "b").extra == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 1\nstepz: 2", r"run.yaml:2: expected options of flr try, got stepz; did you mean steps\?$"),
        ("config: x", "run.yaml:1: expected options of flr try, got config"),
        ("rate: 1\n\nsteps: many", r"run.yaml:3: steps: expected an integer, got 'many'$"),
        ("steps: 1.5", "run.yaml:1: steps: expected an integer, got '1.5'"),
        ("strategy: off", "run.yaml:1: strategy: expected one of no, epoch, got 'off'"),
        ("sizes:\n- 1\n- two", "run.yaml:3: sizes: expected an integer, got 'two'"),
        ("sizes: [[1]]", "run.yaml:1: sizes: expected a list of values, got lists or mappings in it"),
        ("sizes: null", "run.yaml:1: sizes: expected an integer, got null"),
        ("rate: [1]", r"run.yaml:1: rate: expected one value, got a list"),
        ("rate: {a: 1}", r"run.yaml:1: rate: expected a value, got a mapping"),
        ("rate: null", r"run.yaml:1: rate: expected a number, got null"),
        ("rate: 1\nrate: 2", "run.yaml:2: rate: expected once, got it again"),
        ("extra:\n  a: 1\n  a: 2", "run.yaml:3: a: expected once, got it again"),
        ("extra: &x {a: *x}", "run.yaml:1: extra: expected what JSON can say, got Circular reference"),
        (
            "extra: {a: !!python/object:os.system x}",
            "run.yaml:1: extra: expected plain values, got could not determine",
        ),
        ("name: !!python/name:os.system x", "run.yaml:1: name: expected a plain value, got the tag"),
        ("- rate", "run.yaml:1: expected options of flr try as name: value, got a list"),
        ("rate", "run.yaml:1: expected options of flr try as name: value, got 'rate'"),
        ("? [a]\n: 1", "run.yaml:1: expected options of flr try, got a list or mapping as a name"),
        ("rate: 1\nname: [a\nsteps: 2", "run.yaml:3: expected YAML, got expected ',' or ']'"),
        ("rate: 1\n\tsteps: 2", "run.yaml:2: expected YAML, got found character"),
        ("rate: 1\n---\nrate: 2", "run.yaml:2: expected YAML, got but found another document"),
        ("rate: *x", "run.yaml:1: expected YAML, got found undefined alias"),
        (b"name: \xff", "run.yaml: expected YAML in UTF-8, got 'utf-8' codec"),
        ("name: \x07", "run.yaml: expected YAML in UTF-8, got unacceptable character"),
        ("extra: " + "[" * 5000, "run.yaml: expected lists and mappings a few levels deep, got too many levels"),
        ("#" * (MAX_BYTES + 1), "run.yaml: expected at most 1048576 bytes, got more"),
        ("extra: {a: 1" + "0" * 5000 + "}", "run.yaml:1: extra: expected what JSON can say, got Exceeds the limit"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_only_a_file_is_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "something else"), (".", "something else"), ("absent", "nothing")):
        assert main(["recommend", "--config", str(tmp_path / name)]) == 1
        assert f"flr recommend: config: expected a YAML file, got {what} at" in capsys.readouterr().err


def test_training_arguments_from_a_file(tmp_path):
    from flr.train import SFTConfig

    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\neval_strategy: no\nload_best_model_at_end: no\nuse_cpu: yes\nlearning_rate: 1e-4\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5, names: [a, no]}\n"
        "report_to: [none]\nsave_steps: 0.5\n"
    )
    args = parse("sft", "", (SFTConfig,), ["--config", str(path)])[0]
    assert (args.eval_strategy.value, args.load_best_model_at_end, args.learning_rate) == ("no", False, 1e-4)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5, "names": ["a", "no"]}
    assert (args.save_steps, args.report_to) == (0.5, [])
