"""``flr report RUN``: a page about a training run, or about two compared; and what a run keeps for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import option

from . import voice
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.evaluate import EvalResult

ABOUT = (
    "Write a page about a run of flr sft or flr rl, or about two compared: training curves, factors over training, "
    "what each factor likes, metrics by user group."
)
_SPLITS = ("valid", "test")  # whose evaluations lie in folders of that name
_METRICS = ("hr@10", "ndcg@10")
_ANSWERED = "model"  # of an evaluation's settings: the digest of what answered


@dataclass
class ReportOptions:
    """Which runs, and where to. The runs may stand first, without a flag: ``flr report runs/a runs/b``."""

    runs: list[str] = option([], "One or two folders of flr sft, flr rl or flr compare.")
    output: str | None = option(None, "HTML file to write. None: report.html in the first run's folder.")


def for_report(result: EvalResult, dataset: RecDataset, model: Path) -> EvalResult:
    """The result, which knows now what answered, and how often each row's target is a target in training.

    Args:
        result: of the model in the folder ``model``.
        dataset: that the rows are of.
    """
    import numpy as np

    from flr.model.fingerprint import folder_fingerprint

    result.settings[_ANSWERED] = folder_fingerprint(model)
    counts = np.bincount(dataset.train.targets, minlength=len(dataset.catalogue))
    result.traits["target_popularity"] = counts[result.targets].astype(np.int64)
    return result


def keep_for_report(args: Any, model: Any, processor: Any, dataset: RecDataset, valid: EvalResult | None) -> None:
    """Write what :func:`main` shows into the folder of a run that has just ended."""
    from flr.explain import factor_likes
    from flr.files import write_json
    from flr.model.backbone import causal_lm, is_patched
    from flr.train.run_folder import LIKES_NAME, VALID_NAME
    from flr.train.zero import shards_weights

    if not args.should_save or valid is None:
        return
    root = Path(str(args.output_dir))
    for_report(valid, dataset, root).save(root / VALID_NAME)
    lm = causal_lm(model)
    attends = is_patched(lm) and lm._flr_patch.config.has_reasoner and lm._flr_patch.config.variant != "offsets"
    # a forward of one process alone would wait for the others
    sharded = args.world_size > 1 and (bool(args.fsdp) or shards_weights(args))
    if attends and not sharded and (dataset.valid.histories.lengths > 1).any():
        write_json(root / LIKES_NAME, {"factors": factor_likes(model, processor, dataset.valid)})


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, EvalResult]]:
    """What :func:`flr.report.run.write_runs` shows of a run, and its evaluations by split.

    Raises:
        ValueError: the folder holds no training, finished or not.
    """
    from flr.evaluate import by_trait
    from flr.files import read_json
    from flr.model.folder import UPDATE_NAME
    from flr.train.run_folder import LIKES_NAME, RUN_NAME, STATE_NAME, checkpoints

    places = [folder, *checkpoints(folder)]  # a run that has not ended has its checkpoints
    state_file = next((place / STATE_NAME for place in places if (place / STATE_NAME).is_file()), None)
    if state_file is None:
        raise ValueError(f"runs: expected a folder that flr sft or flr rl wrote, got {folder} without {STATE_NAME}")
    state = read_json(state_file)
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(line, dict) for line in log):
        raise ValueError(f"{state_file}: expected the log of a training, got {type(log).__name__}")
    ended = (folder / RUN_NAME).is_file()
    summary = read_json(folder / RUN_NAME).get("summary", {}) if ended else {}
    results = _evaluations(folder)
    evaluations = {
        split: {
            "metrics": result.metrics["item"],
            "intervals": {name: list(interval) for name, interval in result.intervals["item"].items()},
            "groups": {trait: by_trait(result, trait, _METRICS) for trait in result.traits},
        }
        for split, result in results.items()
    }
    likes = read_json(folder / LIKES_NAME).get("factors", []) if (folder / LIKES_NAME).is_file() else []
    facts = _facts(summary, state, ended)
    if (folder / UPDATE_NAME).is_file():  # all else here is of the run
        facts["State"] += "; its model was updated since"
    run = {"name": folder.name, "facts": facts, "log": log, "metrics": list(_METRICS)}
    return {**run, "evaluations": evaluations, "likes": likes}, results


def _evaluations(folder: Path) -> dict[str, EvalResult]:
    """A run's evaluations by split, but for those of a model that the folder has no longer."""
    from flr.evaluate import EvalResult
    from flr.model.fingerprint import folder_fingerprint

    places = {split: folder / split for split in _SPLITS if (folder / split / "ranks.parquet").is_file()}
    found = {split: EvalResult.load(place) for split, place in places.items()}
    now = folder_fingerprint(folder) if any(_ANSWERED in result.settings for result in found.values()) else None
    for split, place in places.items():
        if found[split].settings.get(_ANSWERED, now) != now:
            again = f"flr evaluate --model {folder} --split {split} --output {place}"
            voice.note(f"{place} is left out: {folder} has been changed since, and answers otherwise. Again: {again}")
            del found[split]
    return found


def _facts(summary: dict[str, Any], state: dict[str, Any], ended: bool) -> dict[str, str]:
    """Values by what they are, as text."""
    best = state.get("best_metric")
    named = {
        "State": "finished" if ended else "not finished",
        "Variant": summary.get("variant"),
        "Training rows": _count(summary.get("train_rows")),
        "Steps": _count(state.get("global_step")),
        "Epochs": None if state.get("epoch") is None else f"{state['epoch']:.4g}",
        "Time": f"{summary['seconds']:.0f} s" if summary.get("seconds") else None,
        "Tokens a second": f"{summary['tokens_per_second']:,.0f}" if summary.get("tokens_per_second") else None,
        "Best on valid": f"{best:.4f}" if isinstance(best, float) else None,
    }
    return {name: str(value) for name, value in named.items() if value is not None}


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def differences(results: list[dict[str, EvalResult]]) -> dict[str, Any]:
    """By split, the second run's metrics minus the first's; splits whose rows are not the same are left out."""
    import numpy as np

    found: dict[str, Any] = {}
    for split in _SPLITS if len(results) > 1 else ():
        a, b = (own.get(split) for own in results)
        if a is not None and b is not None and a.users == b.users and np.array_equal(a.targets, b.targets):
            found[split] = {name: list(a.difference(b, name)) for name in a.intervals["item"]}
    return found


def main(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    options, rest = parse("report", ABOUT, (ReportOptions,), argv)
    if not 1 <= len(options.runs) <= 2:
        raise ValueError(f"runs: expected one or two folders, got {len(options.runs)}")
    from flr.report.drawing import WITHOUT, can_draw
    from flr.report.run import write_runs

    folders = [Path(run) for run in options.runs]
    runs, results = zip(*map(read_run, folders), strict=True)
    if len(runs) > 1 and runs[0]["name"] == runs[1]["name"]:
        for run, folder in zip(runs, folders, strict=True):
            run["name"] = str(folder)
    if not can_draw():
        voice.note(WITHOUT)
    changes = differences(list(results))
    output = Path(options.output) if options.output else folders[0] / "report.html"
    write_runs(runs, output, changes)
    for split, values in changes.items():
        mean, low, high, _ = values["ndcg@10"]
        voice.result(
            f"NDCG@10 on {split}, {runs[1]['name']} minus {runs[0]['name']}: {mean:+.4f} ({low:+.4f} to {high:+.4f})."
        )
    voice.result(f"Wrote {output}.")
    emit(
        {
            "report": str(output),
            "runs": [{k: run[k] for k in ("name", "facts", "evaluations", "likes")} for run in runs],
            "differences": changes,
        },
        rest.json,
    )
    return 0
