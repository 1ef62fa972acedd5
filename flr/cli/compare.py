"""``flr compare``: the variants under one budget, data and seeds, with paired intervals against the control."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from flr.config import FLRConfig
from flr.data import RecDataset
from flr.evaluate import EvalResult, evaluate
from flr.evaluate.metrics import paired_difference, row_metrics
from flr.files import write_json
from flr.train import SFTConfig

from .options import AugmentOptions, DataOptions, ModelOptions
from .parsing import console, emit, parse
from .sft import train

ABOUT = (
    "Train none / anchor / latentr3 / flr under one budget and several seeds; paired bootstrap intervals and a plot."
)
MODES = {
    "none": "no thought",
    "anchor": "one more token, no factors: the control",
    "latentr3": "one factor",
    "flr": "K factors",
    "flr-plain": "K factors, regularisers off",
}
METRICS = ("hr@10", "ndcg@10")


@dataclass
class CompareOptions:
    """What to compare."""

    modes: str = field(default="none,anchor,latentr3,flr", metadata={"help": f"Some of {', '.join(MODES)}."})
    seeds: int = field(default=3, metadata={"help": "Seeds a mode, 0 to N - 1."})
    split: str = field(default="test", metadata={"help": "Split that is reported; models are chosen on valid."})
    keep: bool = field(default=False, metadata={"help": "Keep the checkpoints of every run."})

    def mode_list(self) -> list[str]:
        modes = [m.strip() for m in self.modes.split(",") if m.strip()]
        odd = [m for m in modes if m not in MODES]
        if odd or not modes:
            raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {self.modes!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        return modes


def mode_config(mode: str, config: FLRConfig) -> FLRConfig:
    """The configuration of a mode: everything but the variant (and the regularisers) as given."""
    if mode == "flr-plain":
        return dataclasses.replace(
            config, variant="flr", orthogonality_weight=0.0, diversity_weight=0.0, sparsity_weight=0.0
        )
    anchor = "token" if mode == "anchor" and config.anchor == "none" else config.anchor  # the control is its anchor
    return dataclasses.replace(config, variant=mode, anchor=anchor)


def _values(options: Any) -> dict[str, str]:
    """Options as text by name, less the folders and names that do not change a result."""
    skipped = ("output_dir", "logging_dir", "run_name")
    return {f.name: str(getattr(options, f.name)) for f in dataclasses.fields(options) if f.name not in skipped}


def run(
    mode: str,
    seed: int,
    folder: Path,
    data: DataOptions,
    augment: AugmentOptions,
    model_options: ModelOptions,
    config: FLRConfig,
    args: SFTConfig,
    dataset: RecDataset,
    split: str,
    keep: bool,
) -> tuple[dict[str, Any], EvalResult]:
    """Train and evaluate one mode with one seed; a finished run of the same settings is read from ``folder`` instead.

    Raises:
        ValueError: the folder holds a run of other settings, which would be passed off as this one.
    """
    result_folder = folder / split
    summary_file, settings_file = folder / "run.json", folder / "settings.json"
    settings = {type(p).__name__: _values(p) for p in (data, augment, model_options, mode_config(mode, config), args)}
    if settings_file.is_file() and json.loads(settings_file.read_text()) != settings:
        raise ValueError(f"output_dir: {folder} holds a run of other settings; delete it or choose another output_dir")
    write_json(settings_file, settings)
    if (result_folder / "metrics.json").is_file() and summary_file.is_file():
        return json.loads(summary_file.read_text()), EvalResult.load(result_folder)
    started = time.perf_counter()
    run_args = dataclasses.replace(args, output_dir=str(folder), seed=seed, data_seed=seed)
    model, processor, summary = train(data, augment, model_options, mode_config(mode, config), run_args, dataset)
    result = evaluate(
        model, processor, getattr(dataset, split), num_beams=args.eval_num_beams, output_dir=result_folder, name=mode
    )
    parameters = sum(p.numel() for p in model.parameters())
    row = {
        "mode": mode,
        "seed": seed,
        "metrics": result.metrics["item"],
        "parameters": parameters,
        "valid": summary["best_valid"],
    }
    row["intervals"] = {name: list(interval) for name, interval in result.intervals["item"].items()}
    row["seconds"] = round(time.perf_counter() - started, 1)
    write_json(summary_file, row)
    if not keep:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return row, result


def compare(
    options: CompareOptions,
    data: DataOptions,
    augment: AugmentOptions,
    model_options: ModelOptions,
    config: FLRConfig,
    args: SFTConfig,
) -> dict[str, Any]:
    """All modes and seeds; rows, means, and differences to the control pooled over seeds."""
    dataset = data.load()
    console.print(dataset)
    root = Path(str(args.output_dir))
    rows: list[dict[str, Any]] = []
    results: dict[str, list[EvalResult]] = {}
    for mode in options.mode_list():
        for seed in range(options.seeds):
            console.print(f"[bold]{mode}[/bold], seed {seed}: {MODES[mode]}")
            folder = root / f"{mode}-{seed}"
            row, result = run(
                mode, seed, folder, data, augment, model_options, config, args, dataset, options.split, options.keep
            )
            rows.append(row)
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
    values = [np.mean([row_metrics(r.ranks["item"])[metric] for r in group], axis=0) for group in (control, runs)]
    d = paired_difference(values[0], values[1], control[0].users, control[0].samples)
    return (d.mean, d.low, d.high)


def print_table(outcome: dict[str, Any]) -> None:
    """Means over seeds, the seeds' range, and the difference to the control."""
    seeds = len({r["seed"] for r in outcome["rows"]})
    table = Table(title=f"{outcome['split']}, mean over {seeds} seed(s); difference to anchor with 95 % interval")
    for name in ("mode", *METRICS, "seeds' ndcg@10", "Δ ndcg@10", "seconds"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for mode in dict.fromkeys(r["mode"] for r in outcome["rows"]):
        rows = [r for r in outcome["rows"] if r["mode"] == mode]
        means = [f"{sum(r['metrics'][m] for r in rows) / len(rows):.4f}" for m in METRICS]
        each = " ".join(f"{r['metrics']['ndcg@10']:.4f}" for r in rows)
        d = outcome["differences"].get(mode, {}).get("ndcg@10")
        change = "" if d is None else f"{d[0]:+.4f} [dim]{d[1]:+.4f}…{d[2]:+.4f}[/dim]"
        table.add_row(mode, *means, each, change, f"{sum(r['seconds'] for r in rows) / len(rows):.0f}")
    console.print(table)


def main(argv: list[str]) -> int:
    classes = (CompareOptions, DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig)
    *parts, rest = parse("compare", ABOUT, classes, argv)
    outcome = compare(*parts)
    print_table(outcome)
    root = Path(str(parts[-1].output_dir))
    write_json(root / "compare.json", outcome)
    from flr.report.plots import plot_compare

    plot_compare(outcome["rows"], root / "compare.png")
    console.print(f"written: {root / 'compare.json'}, {root / 'compare.png'}")
    emit(outcome, rest.json)
    return 0
