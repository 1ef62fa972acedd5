"""``flr plan``: what everybody's lists cost a day, from measured times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import option

from . import voice
from .options import check_option
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.batch.cost import Size

ABOUT = (
    "Device-hours, machines and money for lists of so many users a day, from times that flr bench measured. Says which "
    "figures were measured, and how the others follow. See docs/scale.md."
)
_BYTES = 4  # of a parameter in float32
_LARGEST = 10**12
_PROMPT = 24  # tokens of a prompt beside its history: instruction, thought


@dataclass
class PlanOptions:
    """For whom, from which catalogue, with which model, on what."""

    users: float = option(1e6, "Users a day, a list each.")
    items: float = option(1e5, "Items of the catalogue.")
    model: str | None = option(
        None, "Folder of a model: its sizes, thought and scoring. Instead of hidden, layers and vocabulary."
    )
    hidden: int | None = option(None, "Width of the backbone.")
    layers: int | None = option(None, "Its layers.")
    vocabulary: int | None = option(None, "Its vocabulary.")
    history: int = option(50, "Items of a history.")
    item_tokens: int = option(4, "Tokens an item, in the prompt and in the search.")
    k: int = option(20, "Items of a list.")
    beams: int = option(20, "Beams; at least k are used.")
    factors: int | None = option(None, "K, factors of the thought. Default: the model's, or 4.")
    refinements: int | None = option(None, "T, refinements of the thought. Default: the model's, or 1.")
    scoring: str | None = option(
        None,
        "catalogue or full: whether logits of the whole vocabulary are computed. Default: the model's, or catalogue.",
    )
    batch: int = option(32, "Users that are computed together; they share what a step costs whatever it computes.")
    device: str = option("cpu", "What was measured: cpu (one core), h100 or h200.")
    per_machine: int = option(1, "Devices (GPUs or cores) of a machine.")
    hours: float = option(24.0, "Hours a day in which the lists are made.")
    price_per_hour: float | None = option(None, "Price of a machine's hour, in any currency. Default: no prices.")
    results: str | None = option(None, "Folder of results of flr bench. Default: bench/results of the checkout.")

    def __post_init__(self) -> None:
        for name in ("users", "items"):
            value = getattr(self, name)
            check_option(self, f"a whole number from 1 to {_LARGEST:.0e}", 1 <= value <= _LARGEST, name)
            check_option(self, "a whole number", float(value).is_integer(), name)
        sizes = [getattr(self, name) for name in ("hidden", "layers", "vocabulary")]
        if self.model is None and None in sizes:
            raise ValueError("model: expected a folder, or hidden, layers and vocabulary, got neither whole")
        if self.model is not None and any(x is not None for x in sizes):
            raise ValueError("model: expected either a folder or hidden, layers and vocabulary, got both")
        for name, most in (
            *(("hidden", 1 << 16), ("layers", 1 << 10), ("vocabulary", 1 << 24), ("factors", 256)),
            *(("refinements", 256), ("history", 10_000), ("item_tokens", 1000), ("k", 1000), ("beams", 1000)),
            *(("per_machine", 10_000), ("batch", 1024)),
        ):
            value = getattr(self, name)
            check_option(self, f"a whole number from 1 to {most}", value is None or 1 <= value <= most, name)
        check_option(self, "more than 0 and at most 24", 0 < self.hours <= 24, "hours")
        check_option(self, "catalogue or full", self.scoring in (None, "catalogue", "full"), "scoring")
        price = self.price_per_hour
        ok = price is None or (math.isfinite(price) and price >= 0)
        check_option(self, "a number of at least 0", ok, "price_per_hour")

    def size(self) -> tuple[Size, dict[str, Any]]:
        """The backbone, and what its configuration says of the thought."""
        from flr.batch.cost import Size

        if self.model is None:
            return Size.plain(self.hidden or 0, self.layers or 0, self.vocabulary or 0), {}
        from flr.files import read_json

        file = Path(self.model) / "config.json"
        if not file.is_file():
            raise ValueError(f"model: expected a folder with config.json, got {self.model!r}")
        config = read_json(file, 1 << 20)
        thought = config.get("flr")
        return Size.of_config(config), thought if isinstance(thought, dict) else {}

    def processor(self) -> dict[str, Any]:
        """What the model's processor says of its answers; nothing where there is none."""
        from flr.files import read_json

        file = Path(self.model or "") / "processor_config.json"
        return read_json(file, 1 << 24) if self.model is not None and file.is_file() else {}


def _thoughts(options: PlanOptions, saved: dict[str, Any]) -> dict[str, Any]:
    """K and T, thoughts one after the other and side by side, as a configuration says where the options do not."""
    has_factors = saved.get("variant", "flr") not in ("none", "anchor")
    factors = options.factors or (int(saved.get("num_factors", 4)) if has_factors else 0)
    return {
        "factors": factors,
        "refinements": options.refinements or int(saved.get("num_refinements", 1)),
        "thoughts": int(saved.get("num_thoughts", 1)) if saved.get("variant") != "none" else 0,
        "mixed": factors if saved.get("aggregation") == "mixture" else 1,
    }


def plan(options: PlanOptions) -> dict[str, Any]:
    """All figures, by name."""
    from flr.batch.cost import Work, cost, rates

    size, saved = options.size()
    thought, processor = _thoughts(options, saved), options.processor()
    full = (options.scoring or processor.get("scoring")) == "full"
    folder = Path(options.results) if options.results else Path(__file__).parents[2] / "bench/results"
    at = rates(folder, options.device)
    prompt = options.history * options.item_tokens + _PROMPT
    beams = max(options.beams, options.k)
    work = Work(prompt, options.item_tokens, beams=beams, full=full, batch=options.batch, **thought)
    parts = cost(size, work, at)
    seconds = sum(parts.values())
    device_hours = seconds * options.users / 3600
    machine_hours = device_hours / options.per_machine
    trie = {"trie_bytes": int(options.items * (8 + 16 * options.item_tokens)), "weight_bytes": size.parameters * _BYTES}
    figures = {"prompt_tokens": prompt, "beams": beams, "parameters": size.parameters}
    letters = {"factors": "K", "refinements": "T", "thoughts": "N"}
    figures |= {letters.get(name, name): value for name, value in thought.items()}
    return {
        "device": at.device,
        **figures,
        "seconds_a_user": seconds,
        "parts": parts,
        "users_a_second": 1 / seconds,
        "device_hours_a_day": device_hours,
        "machine_hours_a_day": machine_hours,
        "machines": math.ceil(machine_hours / options.hours),
        "price_a_day": None if options.price_per_hour is None else machine_hours * options.price_per_hour,
        "memory": trie,
        "measured": list(at.measured),
        "extrapolated": [*at.extrapolated, *_followed(options.batch), *_left_out(processor.get("views"))],
    }


def _followed(users: int) -> list[str]:
    """How what was not measured follows from what was."""
    return [
        "prompts, thoughts and beams in proportion to their multiplications and additions (linear in tokens and beams, "
        "plus attention), for any size of model",
        f"a step's own cost in proportion to layers, over batches of {users} users",
        "machines work all the time at the measured speed, and nothing fails; reading and writing are left out",
        "items: a search does not depend on their number; the trie's bytes are at most 16 a token and 8 an item",
    ]


def _left_out(views: dict[str, float] | None) -> list[str]:
    """What a model answers with beside the prompt, of which nothing is known here."""
    if not views or not (views.get("weight") or views.get("neighbours")):
        return []
    return ["the model's views of single items and its neighbours are left out; flr batch shows users a second"]


def main(argv: list[str]) -> int:
    options, rest = parse("plan", ABOUT, (PlanOptions,), argv)
    found = plan(options)
    what = (
        f"{options.users:,.0f} users a day, {options.items:,.0f} items, {found['parameters'] / 1e6:,.1f} M parameters"
    )
    table = voice.table(f"{what}, on {found['device']}", "part", "ms a user", "share")
    names = {
        "prompt": f"prompt, {found['prompt_tokens']} tokens",
        "thought": f"thought, K = {found['K']}, T = {found['T']}" + (f", N = {found['N']}" if found["N"] > 1 else ""),
        "beams": f"beams, W = {found['beams']}" + (f" of {found['mixed']} thoughts" if found["mixed"] > 1 else ""),
        "steps": f"steps, {options.item_tokens}",
        "head": "logits of the vocabulary",
    }
    for part, seconds in found["parts"].items():
        if seconds or part != "head":
            table.add_row(names[part], f"{1e3 * seconds:,.3f}", f"{seconds / found['seconds_a_user']:.1%}")
    table.add_row("together", f"{1e3 * found['seconds_a_user']:,.3f}", "")
    voice.result(table)
    voice.result(in_words(found, options))
    for name in ("measured", "extrapolated"):
        for line in found[name]:
            voice.result(f"{name.capitalize()}: {line}.")
    emit(found, rest.json)
    return 0


def in_words(found: dict[str, Any], options: PlanOptions) -> str:
    """Hours, machines and money in a sentence."""
    many = "machine" if found["machines"] == 1 else "machines"
    text = (
        f"{found['device_hours_a_day']:,.1f} device-hours a day, {found['machine_hours_a_day']:,.1f} machine-hours: "
        f"{found['machines']:,} {many} of {options.per_machine} for {options.hours:g} hours"
    )
    if found["price_a_day"] is not None:
        text += f", {found['price_a_day']:,.2f} a day at {options.price_per_hour:g} an hour"
    memory = found["memory"]
    return f"{text}. Memory of a process: weights {_gb(memory['weight_bytes'])}, trie {_gb(memory['trie_bytes'])}."


def _gb(number: int) -> str:
    return f"{number / 1e9:,.2f} GB"
