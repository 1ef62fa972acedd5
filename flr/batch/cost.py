"""What lists for many users cost: from measured times of prompts and searches to machine-hours.

    a prompt    F = 2 · weights · L + 2 · layers · D · L²          multiplications and additions, causal attention
    a thought   T · K · (4 · D · L + 8 · D²)                       the reasoner over the history, N times
    a beam      2 · weights + 4 · layers · D · L                   one token of one hypothesis
    a head      2 · D · V                                          only with scoring ``full``

A further thought is a token and a step. A mixture of K factors has K thoughts, each with beams and heads of its own.
``weights`` are those of the layers' matrices. Measured are the rate of prompts (operations a second) and, of a search,
what a step costs a batch whatever it computes, and the rate of its beams. Everything else follows from them in
proportion to the operations above, a step's own cost to the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flr.files import naming, read_json

_MAX_BYTES = 1 << 26  # of a results file
_DEVICES = {"h200": "nvidia-h200", "h100": "nvidia-h100", "cpu": "cpu"}


class Size(NamedTuple):
    """A backbone: width D, layers, vocabulary V, numbers in the layers' matrices, numbers of all parameters."""

    hidden: int
    layers: int
    vocabulary: int
    weights: int
    parameters: int

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> Size:
        """Of a saved ``config.json`` with attention and a gated or plain MLP, as Llama, Qwen, Mistral, GPT-2 have.

        A model that flr saved has the backbone's under ``base_config``.

        >>> Size.of_config({"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 32,
        ...                 "num_attention_heads": 2, "num_key_value_heads": 1}).weights
        1920

        Raises:
            ValueError: it lacks a size.
        """
        config = config.get("base_config") or config
        config = config.get("text_config") or config
        names = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("vocab_size",)
        sizes = [next((config[name] for name in either if config.get(name)), None) for either in names]
        for value, (name, *_) in zip(sizes, names, strict=True):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json: expected {name}, a number of at least 1, got {value!r:.80}")
        hidden, layers, vocabulary = (int(x or 0) for x in sizes)
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        width = config.get("head_dim") or hidden // heads
        keys = (config.get("num_key_value_heads") or heads) * width
        inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
        mlp = (2 if "n_embd" in config else 3) * hidden * inner
        weights = layers * (2 * hidden * heads * width + 2 * hidden * keys + mlp)
        tables = 1 if config.get("tie_word_embeddings", True) else 2
        return cls(hidden, layers, vocabulary, weights, weights + tables * hidden * vocabulary)

    @classmethod
    def plain(cls, hidden: int, layers: int, vocabulary: int) -> Size:
        """Of the usual shape: 12 D² numbers a layer, one table of embeddings."""
        weights = 12 * layers * hidden**2
        return cls(hidden, layers, vocabulary, weights, weights + hidden * vocabulary)

    def prompt_flops(self, length: int) -> float:
        """Operations of one prompt of ``length`` tokens."""
        return 2.0 * self.weights * length + 2.0 * self.layers * self.hidden * length**2

    def thought_flops(self, length: int, factors: int, refinements: int) -> float:
        """Operations of one thought."""
        return refinements * factors * (4.0 * self.hidden * length + 8.0 * self.hidden**2)

    def beam_flops(self, length: int) -> float:
        """Operations of one token of one beam."""
        return 2.0 * self.weights + 4.0 * self.layers * self.hidden * length

    def head_flops(self) -> float:
        """Operations of one row of logits."""
        return 2.0 * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Rates:
    """What was measured on a device.

    Attributes:
        device: its name.
        prompt: operations a second of prompts.
        beam: operations a second of beams.
        step: seconds of a search's step beside that, for a model of one layer and a whole batch.
            measured: which file says what.
        extrapolated: what was not measured, and where it was taken from instead.
    """

    device: str
    prompt: float
    beam: float
    step: float
    measured: tuple[str, ...]
    extrapolated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What is asked for: the tokens of a prompt and of an item, the thought (K = 0: none), the search."""

    prompt: int
    item_tokens: int
    factors: int
    refinements: int
    beams: int
    full: bool
    batch: int  # users that are computed together
    thoughts: int = 1  # N, made one after the other
    mixed: int = 1  # thoughts side by side, whose answers are mixed: K in a mixture


def rates(results: Path, device: str) -> Rates:
    """What the newest committed results say of a device.

    Args:
        results: a folder of ``DEVICE/COMMIT.json``, as ``flr bench run`` writes it.
        device: "cpu", "h100" or "h200".

    Raises:
        ValueError: no such folder, a device that was not measured, a damaged file.
    """
    if device not in _DEVICES:
        raise ValueError(f"device: expected one of {', '.join(_DEVICES)}, got {device!r:.80}")
    if not results.is_dir():
        raise ValueError(f"results: expected a folder of results (bench/results of a checkout), got {str(results)!r}")
    runs = [(run["date"], path, run) for path, run in _runs(results, _DEVICES[device])]
    runs.sort(key=lambda entry: entry[0], reverse=True)
    for _, path, run in runs:
        rows = [row for row in run["rows"] if row["suite"] == "cost" and "p50_ms" in row]
        if {row["shape"]["work"] for row in rows} == {"prompt", "search"}:
            return _fitted(run["device"], f"{path.parent.name}/{path.name}", rows)
    return _borrowed(device, runs)


def _runs(results: Path, start: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every run of a device with its file, those of the smallest sizes left out."""
    for path in sorted(results.glob(f"{start}*/*.json")):
        document = read_json(path, _MAX_BYTES)
        with naming(path, "a results file of flr bench"):
            yield from ((path, run) for run in document["runs"] if run["tier"] != "quick")


def _fitted(device: str, file: str, rows: list[dict[str, Any]]) -> Rates:
    """Rates from rows of the suite ``cost``, all of one model."""
    shape = rows[0]["shape"]
    size = Size(shape["D"], shape["layers"], shape["V"], shape["weights"], 0)
    seconds = {(row["shape"]["work"], row["shape"]["L"], row["shape"]["W"]): row["p50_ms"] / 1e3 for row in rows}
    prompts = {length: t for (work, length, _), t in seconds.items() if work == "prompt"}
    users = shape["B"]
    prompt = users * sum(map(size.prompt_flops, prompts)) / sum(prompts.values())
    searches = sorted((beams, length, t) for (work, length, beams), t in seconds.items() if work == "search")
    steps = 4 - 1  # tokens of an item after the first, whose logits are the prompt's
    flops = np.array([users * beams * size.beam_flops(length) for beams, length, _ in searches])
    times = np.array([t - prompts[length] for _, length, t in searches]) / steps
    slope, floor = np.polyfit(flops, times, 1)
    if slope <= 0 or floor < 0:  # within noise: everything is the beams'
        slope, floor = float((times / flops).mean()), 0.0
    numbers = f"D = {size.hidden}, {size.layers} layers, {users} users a batch"
    beams_of = ", ".join(str(beams) for beams, _, _ in searches)
    lengths = ", ".join(map(str, sorted(prompts)))
    measured = (
        f"prompts of {lengths} tokens and searches of {beams_of} beams over 4 tokens, {numbers}: {file}",
        f"so prompts {prompt / 1e9:,.0f} GFLOP/s, beams {1e-9 / slope:,.0f} GFLOP/s, "
        f"{1e3 * floor / size.layers:.3f} ms a step and layer",
    )
    return Rates(device, prompt, 1 / slope, float(floor) / size.layers, measured)


def _borrowed(device: str, runs: list[tuple[str, Path, dict[str, Any]]]) -> Rates:
    """Where parts were not measured: the rate of training steps, and of a small model's search all the time."""
    found: dict[str, tuple[str, dict[str, Any], str]] = {}
    for _, path, run in runs:
        for row in run["rows"]:
            kind = f"{row['suite']} {row['case'].split()[0]}"
            if row["variant"] == "flr" and "p50_ms" in row and (kind != "train_step sft" or "flops" in row):
                found.setdefault(kind, (f"{path.parent.name}/{path.name}", row, run["device"]))
    if not {"train_step sft", "decode evaluation"} <= found.keys():
        raise ValueError(f"device: expected one whose costs were measured (flr bench run), got {device!r}")
    (file, sft, name), (other, search, _) = found["train_step sft"], found["decode evaluation"]
    rate = sft["flops"] / (sft["p50_ms"] / 1e3)
    shape = search["shape"]
    step = search["p50_ms"] / 1e3 / shape["layers"] / 4
    measured = (
        f"a training step of D = {sft['shape']['D']}, {sft['shape']['layers']} layers, {rate / 1e12:,.0f} TFLOP/s: "
        f"{file}",
        f"a whole search of {shape['B']} users, D = {shape['D']}, {shape['layers']} layers, titles, "
        f"{search['p50_ms']:.0f} ms: {other}",
    )
    extrapolated = (
        "prompts and beams compute at the rate of the training step: their own was not measured on this device",
        "a step's own cost is that search's whole time over 4 steps, more than it can be: the search had more steps",
    )
    return Rates(name, rate, rate, step, measured, extrapolated)


def cost(size: Size, work: Work, at: Rates) -> dict[str, float]:
    """Seconds of one user's list on one device, by part.

    >>> at = Rates("a device", 1e12, 1e12, 0.0, ())
    >>> parts = cost(Size.plain(64, 2, 1000), Work(100, 4, 4, 1, 20, False, 32), at)
    >>> list(parts), round(1e6 * parts["prompt"], 2)
    (['prompt', 'thought', 'beams', 'steps', 'head'], 22.22)
    """
    steps, more = work.item_tokens - 1, max(work.thoughts * work.mixed - 1, 0)
    rows = work.mixed * (1 + steps * work.beams)
    reasoner = work.thoughts * size.thought_flops(work.prompt, work.factors, work.refinements)
    return {
        "prompt": size.prompt_flops(work.prompt) / at.prompt,
        "thought": (reasoner + more * size.beam_flops(work.prompt)) / at.prompt,
        "beams": steps * work.beams * work.mixed * size.beam_flops(work.prompt) / at.beam,
        "steps": (work.item_tokens + max(work.thoughts - 1, 0)) * at.step * size.layers / work.batch,
        "head": rows * size.head_flops() / at.beam if work.full else 0.0,
    }
