"""``flr compare``: the variants under one budget, data and seeds, with paired intervals against the control."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from flr.config import COUNT, FLRConfig, Numbers, check_numbers, option

from . import voice
from .backbone import ModelOptions
from .options import AugmentOptions, DataOptions
from .parsing import emit, parse
from .sft import train
from .written import write_measured

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.evaluate import EvalResult
    from flr.train import SFTConfig

ABOUT = (
    "Train none / anchor / latentr3 / flr and others under one budget and several seeds; paired bootstrap intervals "
    "and a plot."
)
MODES = {
    "none": "no thought",
    "anchor": "one more token, no factors: the control",
    "latentr3": "one factor",
    "flr": "K factors",
    "flr-plain": "K factors, regularisers off",
    "flr-mixture": "K factors, each with a thought of its own",
    "offsets": "K learned vectors, no attention: the control of the factors",
    "offsets-mixture": "K learned vectors, each with a thought of its own",
}
METRICS = ("hr@10", "ndcg@10")
Parts: TypeAlias = "tuple[DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig]"


@dataclass
class CompareOptions:
    """What to compare."""

    modes: str = option("none,anchor,latentr3,flr", f"Some of {', '.join(MODES)}.")
    seeds: int = option(3, "Seeds a mode, 0 to N - 1.")
    split: str = option("test", "Split that is reported; models are chosen on valid.")
    max_users: int | None = option(None, "Report on that many rows of the split, evenly spread. Default: all.")
    keep: bool = option(False, "Keep the checkpoints of every run.")

    numbers: ClassVar[Mapping[str, Numbers]] = {"seeds": COUNT, "max_users": COUNT.or_none}

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)
        modes = self.mode_list()
        if self.split not in ("valid", "test"):
            raise ValueError(f"split: expected valid or test, got {self.split!r}")
        if not modes or set(modes) - set(MODES):
            raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {self.modes!r}")

    def mode_list(self) -> list[str]:
        """The modes by name."""
        return [mode.strip() for mode in self.modes.split(",") if mode.strip()]


def mode_config(mode: str, config: FLRConfig) -> FLRConfig:
    """The configuration of a mode: everything but variant, aggregation (and the regularisers) as given."""
    if config.mixes:
        raise ValueError(f"aggregation: expected none with flr compare, whose modes say it, got {config.aggregation!r}")
    variant, _, way = mode.partition("-")
    options: dict[str, Any] = {"variant": variant}
    if way == "plain":
        options |= dict.fromkeys(("orthogonality_weight", "diversity_weight", "sparsity_weight"), 0.0)
    elif way == "mixture":
        options["aggregation"] = "mixture"
    if mode == "anchor" and config.anchor == "none":
        options["anchor"] = "token"  # the control is its anchor
    return dataclasses.replace(config, **options)


def _values(options: Any) -> dict[str, str]:
    """Options as text by name, less the folders and names that do not change a result."""
    skipped = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name")
    return {f.name: str(getattr(options, f.name)) for f in dataclasses.fields(options) if f.name not in skipped}


def contents(options: ModelOptions, dataset: RecDataset) -> dict[str, str]:
    """What the rows, the items and the model that runs start from are, wherever they lie: digests by name."""
    from flr.data.interactions import PARTS
    from flr.model.fingerprint import model_fingerprint
    from flr.model.folder import local_folder
    from flr.train.settings import rows_digest

    found = {f"data.{name}": rows_digest(getattr(dataset, name)) for name in PARTS}
    found["data.items"] = dataset.catalogue.digest()[:16]
    if options.model is not None:
        folder = local_folder(options.model, None, options.gguf_file, revision=options.revision)
        found["model.files"] = model_fingerprint(folder)[:16]
    return found


def run_row(mode: str, seed: int, result: EvalResult, seconds: float) -> dict[str, Any]:
    """What the tables show of one run that took so many seconds."""
    row = {"mode": mode, "seed": seed, "metrics": result.metrics["item"]}
    row["intervals"] = {name: list(interval) for name, interval in result.intervals["item"].items()}
    return {**row, "seconds": round(seconds, 1)}


def _check_same_run(folder: Path, settings: dict[str, dict[str, str]]) -> None:
    """Keep the settings of the run in ``folder``; ValueError where it holds one of others."""
    from flr.files import write_json
    from flr.train.settings import differences

    file = folder / "settings.json"
    if file.is_file() and (known := json.loads(file.read_text())) != settings:
        wanted = "a folder without a run of other settings"
        before, now = ({k: v for part in each.values() for k, v in part.items()} for each in (known, settings))
        changes = "; ".join(differences(before, now)[:4])
        raise ValueError(
            f"output_dir: expected {wanted}, got {folder} ({changes}); delete it or choose another output_dir"
        )
    write_json(file, settings)


def run(
    options: CompareOptions, mode: str, seed: int, parts: Parts, dataset: RecDataset, inputs: dict[str, str]
) -> tuple[dict[str, Any], EvalResult]:
    """Train and evaluate one mode with one seed; what its folder holds of it, of the same ``inputs``, is read instead.

    Raises:
        ValueError: the folder holds a run of other settings or inputs, which would be passed off as this one.
    """
    from flr.evaluate import EvalResult, evaluate
    from flr.files import read_json, write_json

    data, augment, model_options, config, args = parts
    folder = Path(str(args.output_dir)) / f"{mode}-{seed}"
    if args.overwrite_output_dir:
        shutil.rmtree(folder, ignore_errors=True)
    config = mode_config(mode, config)
    settings = {type(p).__name__: _values(p) for p in (data, augment, model_options, config, args)}
    if options.max_users is not None:
        settings["CompareOptions"] = {"max_users": str(options.max_users)}
    _check_same_run(folder, {**settings, "contents": inputs})
    summary_file, result_folder = folder / "run.json", folder / options.split
    known = read_json(summary_file) if summary_file.is_file() else {}
    # the folder of valid has a result from training on, of which this command says nothing
    if options.split in known.get("splits", ()) and (result_folder / "metrics.json").is_file():
        result = EvalResult.load(result_folder)
        return {**run_row(mode, seed, result, known["seconds"]), **known["facts"]}, result
    started = time.perf_counter()
    run_args = dataclasses.replace(args, output_dir=str(folder), seed=seed, data_seed=seed)
    model, processor, summary = train(data, augment, model_options, config, run_args, dataset)  # read, if it is done
    rows, beams = getattr(dataset, options.split).spread(options.max_users), args.eval_num_beams
    shown = voice.shows_progress()
    result = evaluate(model, processor, rows, num_beams=beams, output_dir=result_folder, name=mode, progress=shown)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "valid": summary["best_valid"]}
    seconds = known.get("seconds", time.perf_counter() - started)
    splits = sorted({*known.get("splits", ()), options.split})
    write_json(summary_file, {"seconds": seconds, "facts": facts, "splits": splits})
    if not options.keep:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return {**run_row(mode, seed, result, seconds), **facts}, result


def compare(
    options: CompareOptions,
    data: DataOptions,
    augment: AugmentOptions,
    model_options: ModelOptions,
    config: FLRConfig,
    args: SFTConfig,
    dataset: RecDataset | None = None,
    say: Callable[[str], None] = voice.note,
) -> dict[str, Any]:
    """All modes and seeds; rows, means, and differences to the control pooled over seeds.

    ``dataset`` is what ``data`` loads, where that has been done; ``say`` says the line of a run that has ended.
    """
    dataset = data.announce() if dataset is None else dataset
    inputs = contents(model_options, dataset)
    rows: list[dict[str, Any]] = []
    results: dict[str, list[EvalResult]] = {}
    modes = options.mode_list()
    for mode in modes:
        for seed in range(options.seeds):
            place = f"{len(rows) + 1} of {len(modes) * options.seeds}"
            with voice.stage(f"{place}, {run_name(mode, seed, options.seeds)}"):
                row, result = run(options, mode, seed, (data, augment, model_options, config, args), dataset, inputs)
            rows.append(row)
            note_run(row, options.split, MODES[mode], say)
            results.setdefault(mode, []).append(result)
    return {"split": options.split, "rows": rows, "differences": differences(results), "dataset": repr(dataset)}


def differences(results: dict[str, list[EvalResult]], control: str = "anchor") -> dict[str, Any]:
    """Mean over seeds of (mode - control) with a bootstrap interval over users, paired seed by seed."""
    if control not in results:
        return {}
    return {
        mode: {metric: list(seed_difference(results[control], runs, metric)) for metric in METRICS}
        for mode, runs in results.items()
        if mode != control
    }


def seed_difference(control: list[EvalResult], runs: list[EvalResult], metric: str) -> tuple[float, float, float]:
    """Mean, low and high of the difference; users are resampled, their values averaged over seeds first."""
    import numpy as np

    from flr.evaluate.metrics import paired_difference, row_metrics

    values = [np.mean([row_metrics(r.ranks["item"])[metric] for r in group], axis=0) for group in (control, runs)]
    d = paired_difference(values[0], values[1], control[0].users, control[0].samples)
    return (d.mean, d.low, d.high)


def run_name(mode: str, seed: int, seeds: int) -> str:
    """What a run is called; of one seed alone nothing is said."""
    return f"{mode}, seed {seed}" if seeds > 1 else mode


def note_run(row: dict[str, Any], split: str, what: str, say: Callable[[str], None]) -> None:
    """A line about a run that has ended."""
    value, seconds, width = row["metrics"]["ndcg@10"], row["seconds"], max(map(len, MODES))
    say(f"{row['mode']:<{width}}  seed {row['seed']}:  {split} NDCG@10 {value:.4f}, {seconds:.0f} s  ({what})")


def print_table(outcome: dict[str, Any]) -> None:
    """Means over seeds, the seeds' range, and the difference to the control."""
    seeds = len({r["seed"] for r in outcome["rows"]})
    title = f"The {outcome['split']} split"
    title += f", means over {seeds} seeds" if seeds > 1 else ""
    title += "; Δ: difference to anchor, with its 95 % interval" if outcome["differences"] else ""
    heads = [name.upper() for name in METRICS]
    table = voice.table(title, "mode", *heads, *(["of each seed"] if seeds > 1 else []), "Δ NDCG@10", "seconds")
    for mode in dict.fromkeys(r["mode"] for r in outcome["rows"]):
        rows = [r for r in outcome["rows"] if r["mode"] == mode]
        means = [f"{sum(r['metrics'][m] for r in rows) / len(rows):.4f}" for m in METRICS]
        each = [" ".join(f"{r['metrics']['ndcg@10']:.4f}" for r in rows)] if seeds > 1 else []
        d = outcome["differences"].get(mode, {}).get("ndcg@10")
        change = "" if d is None else f"{d[0]:+.4f} [dim]{d[1]:+.4f} to {d[2]:+.4f}[/dim]"
        table.add_row(mode, *means, *each, change, f"{sum(r['seconds'] for r in rows) / len(rows):.0f}")
    voice.result(table)


def main(argv: list[str]) -> int:
    from flr.train import SFTConfig

    classes = (CompareOptions, DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
    *parts, rest = parse("compare", ABOUT, classes, argv)
    outcome = compare(*parts)
    print_table(outcome)

    def draw(path: Path) -> None:
        from flr.report.plots import plot_compare

        plot_compare(outcome["rows"], path)

    write_measured(Path(str(parts[-1].output_dir)), "compare", outcome, draw)
    emit(outcome, rest.json)
    return 0
