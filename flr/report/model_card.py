"""The model card: README.md of a saved model, with metadata that the Hub reads. Plain values come in.

The parts that are written here stand between marks and are written anew; all else in the file, the metadata that is not
ours included, is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard

from flr.files import atomic_file

FILE = "README.md"
_LIMIT = 1 << 20  # bytes of a README.md
_TASK = "sequential-recommendation"
_TAGS = ("recommendation", _TASK, "latent-reasoning")
_NOTE = "flr writes this part anew; what stands outside its marks is kept"
_EMPTY = "---\n{}\n---\n"


class Measured(NamedTuple):
    """A metric of one split: its value and, where there is one, its 95 % interval."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on one split of one data set.

    Attributes:
        data: name of the data set.
        split: train, valid or test.
        metrics: what was measured.
        settings: how, as plain values by name.
    """

    data: str
    split: str
    metrics: Sequence[Measured]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of a model.

    Attributes:
        title: one line.
        facts: rows of the table, by name.
        example: two item ids, or fewer, for the code that shows the use.
        command: that trained the model, None where it is not known.
        settings: of the command, those that are not its defaults.
        versions: of packages, by name.
        base_model: id on the Hub of the model that was trained further, None for others.
    """

    title: str
    facts: Mapping[str, Any]
    example: Sequence[str] = ()
    command: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None


def has_model_part(folder: str | Path) -> bool:
    """Whether the card in ``folder`` says already what the model is."""
    file = Path(folder) / FILE
    return file.is_file() and _marks("model")[0] in _card(file).text


def write_card(folder: str | Path, facts: ModelFacts | None = None, evaluation: Evaluation | None = None) -> None:
    """Write README.md in ``folder``, or bring the one that is there up to date.

    Args:
        folder: of the saved model.
        facts: what the model is; None leaves that part as it is.
        evaluation: metrics; they replace those of the same data set and split, and stand beside others.

    Raises:
        ValueError: the README.md that is there is longer than a card, or its metadata is not valid YAML.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_card(folder, ModelFacts("My model", {"Items": 40}))
        ...     write_card(folder, evaluation=Evaluation("planted", "test", [Measured("ndcg@10", 0.5, 0.4, 0.6)]))
        ...     text = (Path(folder) / "README.md").read_text()
        >>> "| planted | test | ndcg@10 | 0.5000 | 0.4000 to 0.6000 |" in text, "| Items | 40 |" in text
        (True, True)
    """
    file = Path(folder) / FILE
    card = _card(file)
    data: Any = card.data
    if facts is not None:
        data.library_name = data.library_name or "flr"
        data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS]))
        data.base_model = data.base_model or facts.base_model
        card.text = _placed(card.text, "model", _model_part(facts))
    if evaluation is not None:
        data.model_name = data.model_name or "flr"
        others = [r for r in data.eval_results or [] if not _is_of(r, evaluation.data, evaluation.split)]
        data.eval_results = [*others, *map(_result, [evaluation] * len(evaluation.metrics), evaluation.metrics)]
    if data.eval_results:
        card.text = _placed(card.text, "metrics", _metrics_part(data.eval_results))
    _save(card, file)


def drop_metrics(folder: str | Path) -> bool:
    """Take what :func:`write_card` wrote of metrics out of the card in ``folder``; whether there were any.

    Raises:
        ValueError: as :func:`write_card`.
    """
    file = Path(folder) / FILE
    card = _card(file)
    results = card.data.eval_results or []
    others = [result for result in results if result.task_type != _TASK]
    if len(others) == len(results):
        return False
    card.data.eval_results = others or None
    first, last = _marks("metrics")
    before, found, rest = card.text.partition(first)
    if found and last in rest:
        card.text = f"{before.rstrip()}\n\n{rest.partition(last)[2].lstrip()}"
    _save(card, file)
    return True


def _save(card: Any, file: Path) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(str(card).strip() + "\n", encoding="utf-8")


def _card(file: Path) -> Any:
    content = _read(file) if file.is_file() else ""
    if not content.startswith("---"):
        content = _EMPTY + content
    try:
        return ModelCard(content)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: expected a model card with valid metadata, got {error}") from error


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        content = stream.read(_LIMIT + 1)
    if len(content) > _LIMIT:
        raise ValueError(f"{file}: expected at most {_LIMIT} bytes, got more")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got {error}") from error


def _is_of(result: EvalResult, data: str, split: str) -> bool:
    return (result.task_type, result.dataset_name, result.dataset_split) == (_TASK, data, split)


def _result(evaluation: Evaluation, measured: Measured) -> EvalResult:
    interval = None if measured.low is None else {"interval": [measured.low, measured.high], "level": 0.95}
    return EvalResult(
        task_type=_TASK,
        dataset_type=_TASK,
        dataset_name=evaluation.data,
        dataset_split=evaluation.split,
        dataset_args=dict(evaluation.settings) or None,
        metric_type=measured.metric.partition("@")[0],
        metric_name=measured.metric,
        metric_value=measured.value,
        metric_args=interval,
    )


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- flr:{name} ({_NOTE}) -->", f"<!-- /flr:{name} -->"


def _placed(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the marks of this name, at its end where there are none."""
    first, last = _marks(name)
    before, found, rest = text.partition(first)
    if found and last in rest:
        return f"{before}{first}\n{body}\n{last}{rest.partition(last)[2]}"
    return f"{text.strip()}\n\n{first}\n{body}\n{last}\n".lstrip()


def _text(value: Any) -> str:
    """A value as it stands in a table's cell, whatever signs it holds."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", line)  # an underscore inside a word is plain


def _pairs(name: str, value: str, pairs: Mapping[str, Any]) -> str:
    return _table([name, value], [(_text(key), _text(content)) for key, content in pairs.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _model_part(facts: ModelFacts) -> str:
    known = [name for name in facts.example if re.fullmatch(r"[\w. -]+", name)] or ["AN ITEM'S ID"]
    parts = [
        f"# {_text(facts.title)}",
        "Recommends the next item of a history: a causal language model with a latent thought before its answer.",
        _pairs("", "", facts.facts),
        "## How to use it",
        "Plain `transformers` does not know this model type: install and import `flr`.",
        "```python\nimport flr\n\n"
        'recommender = flr.Recommender.from_pretrained("FOLDER OR USER/NAME")\n'
        f"for item in recommender.recommend([{known}], k=10, shares=True)[0]:\n"
        "    print(item.title, item.score, item.factor_shares)\n```",
    ]
    if facts.command is not None:
        parts += ["## Training", f"`{facts.command}`, and of its options those that are not the defaults:"]
        parts += [_pairs("option", "value", facts.settings) if facts.settings else "none."]
    if facts.versions:
        parts += ["## Versions", _pairs("package", "version", facts.versions)]
    return "\n\n".join(parts)


def _metrics_part(results: Sequence[EvalResult]) -> str:
    rows = []
    for result in results:
        if result.task_type == _TASK:
            low, high = (result.metric_args or {}).get("interval") or (None, None)
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            value = f"{result.metric_value:.4f}"
            where = [_text(result.dataset_name), _text(result.dataset_split), _text(result.metric_name)]
            rows.append([*where, value, interval])
    settings = {
        (r.dataset_name, r.dataset_split): ", ".join(f"{name} {value}" for name, value in r.dataset_args.items())
        for r in results
        if r.task_type == _TASK and r.dataset_args
    }
    notes = [f"{_text(data)}, {_text(split)}: {_text(how)}." for (data, split), how in settings.items()]
    about = "Over the whole catalogue, by item, ties against the model; 95 % bootstrap intervals over users."
    head = ["data", "split", "metric", "value", "95 % interval"]
    return "\n\n".join(["## Metrics", about, _table(head, rows), *notes])
