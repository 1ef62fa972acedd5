"""``flr quickstart``: the whole tour on generated data whose true factors are known."""

from __future__ import annotations

import dataclasses
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import FLRConfig, option

from . import rl, voice
from .backbone import ModelOptions
from .compare import METRICS, MODES, CompareOptions, compare, note_run, print_table, run_row, seed_difference
from .options import AugmentOptions, DataOptions, in_words
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.recommend import Explanation

ABOUT = (
    "Train eight small models on generated data, reinforce one of them, compare, explain and report: about five "
    "minutes on one CPU core."
)
_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "report_to": "none",
    "use_cpu": True,
    "logging_strategy": "no",
}


@dataclass
class QuickstartOptions:
    """How much of the tour."""

    output_dir: str = option("quickstart", "Folder for models, pictures and report.html.")
    quick: bool = option(False, "A tenth of the training: to see that everything runs.")
    seeds: int = option(1, "Seeds a mode.")
    open: bool = option(False, "Open the report in a browser at the end.")


def settings(options: QuickstartOptions) -> tuple[Any, ...]:
    """The configuration of the tour; ``flr compare`` takes the same things as flags."""
    from flr.train import SFTConfig

    data = DataOptions(planted_items=200, planted_users=300 if options.quick else 2000)
    model = ModelOptions(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        init_items="title",
        embedding_scale=0.3,
        title_power=1.5,
    )
    config = FLRConfig(
        anchor="none",
        num_factors=4,
        factor_size=64,
        num_refinements=1,
        init_scale=1.0,
        diversity_weight=1.0,
        orthogonality_weight=0.1,
    )
    args = SFTConfig(
        output_dir=f"{options.output_dir}/runs",
        num_train_epochs=1 if options.quick else 8,
        learning_rate=3e-3,
        embedding_dropout=0.1,
        output_dropout=0.1,
        reasoner_learning_rate=3e-4,
        normalisation="catalogue",
        lr_scheduler_type="cosine",
        **_TRAINING,
    )
    compared = CompareOptions(modes=",".join(MODES), seeds=options.seeds)
    return compared, data, AugmentOptions(), model, config, args


def reinforce(options: QuickstartOptions, data: DataOptions, root: Path, dataset: RecDataset, outcome: dict) -> None:
    """Latent GRPO on the model of mode flr; its rows and its difference to the control go into ``outcome``."""
    from flr.evaluate import EvalResult, evaluate
    from flr.train import LatentGRPOConfig

    results = []
    for seed in range(options.seeds):
        started = time.perf_counter()
        folder = root / f"flr + rl-{seed}"
        epochs = 1 if options.quick else 2
        args = LatentGRPOConfig(output_dir=str(folder), num_train_epochs=epochs, seed=seed, **_TRAINING)
        with voice.stage(f"flr + rl, seed {seed}"):
            model, processor, _ = rl.train(rl.RLOptions(model=str(root / f"flr-{seed}")), data, args, dataset)
            shown: dict[str, Any] = {"name": "flr + rl", "progress": voice.shows_progress()}
            result = evaluate(model, processor, dataset.test, output_dir=folder / "test", **shown)
        results.append(result)
        outcome["rows"].append(run_row("flr + rl", seed, result, started))
        note_run(outcome["rows"][-1], "test", "latent GRPO on the model of mode flr")
    control = [EvalResult.load(root / f"anchor-{seed}" / outcome["split"]) for seed in range(options.seeds)]
    outcome["differences"]["flr + rl"] = {m: list(seed_difference(control, results, m)) for m in METRICS}


def recovery(root: Path, mode: str, dataset: RecDataset) -> dict[str, Any]:
    """Agreement of the mode's factors with the planted interests."""
    from flr.data import RecProcessor
    from flr.explain import factor_interest
    from flr.model.checkpoint import from_pretrained

    folder = root / f"{mode}-0"
    model, processor = from_pretrained(folder), RecProcessor.from_pretrained(folder)
    return factor_interest(model, processor, dataset.test, dataset.catalogue.attributes["interest"]).to_dict()


def pictures(rows: list[dict[str, Any]], explanation: Explanation, out: Path) -> dict[str, str]:
    """Captions by file of the pictures for the report: none without matplotlib.

    The attention of the factors is drawn for other uses; the report has it as a table.
    """
    from flr.report.drawing import WITHOUT, can_draw
    from flr.report.html import dark_form
    from flr.report.plots import plot_compare

    if not can_draw():
        voice.note(WITHOUT)
        return {}
    plot_compare(rows, out / "compare.png")
    plot_compare(rows, dark_form(out / "compare.png"), dark=True)
    explanation.heatmap(out / "attention.png")
    return {str(out / "compare.png"): "Metrics by mode"}


def main(argv: list[str]) -> int:
    options, rest = parse("quickstart", ABOUT, (QuickstartOptions,), argv)
    import torch

    from flr.files import write_json
    from flr.model.backbone import causal_lm
    from flr.recommend import Recommender
    from flr.report.quickstart import quickstart_report

    started = time.perf_counter()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much where another process runs
    parts = settings(options)
    data, args = parts[1], parts[-1]
    out, runs = Path(options.output_dir), Path(str(args.output_dir))
    outcome = compare(*parts)
    dataset = data.load()
    reinforce(options, data, runs, dataset, outcome)
    print_table(outcome)

    nmi = {mode: recovery(runs, mode, dataset) for mode in ("flr", "flr-plain")}
    title = "Do the factors find the planted interests? Normalised mutual information"
    table = voice.table(title, "mode", "NMI", "by chance")
    for mode, agreement in nmi.items():
        table.add_row(f"{mode} ({MODES[mode]})", f"{agreement['nmi']:.3f}", f"{agreement['chance']:.3f}")
    voice.result(table)

    longest = max(range(len(dataset.test)), key=lambda i: len(dataset.test[i].history))
    history = [dataset.catalogue.item_ids[i] for i in dataset.test[longest].history]
    recommender = Recommender.from_pretrained(runs / "flr-0")
    explanation = recommender.explain(history, k=5)
    images = pictures(outcome["rows"], explanation, out)
    seconds = time.perf_counter() - started
    quoted = " ".join(history[-3:])
    next_steps = [
        f"flr recommend --model {runs / 'flr-0'} --history {quoted}",
        f"flr explain --model {runs / 'flr-0'} --history {quoted} --html why.html",
        f"flr rl --model {runs / 'flr-0'} --output_dir runs/rl --planted_items {data.planted_items} "
        f"--planted_users {data.planted_users}",
        "flr sft --data <your folder> --codec id --anchor last --output_dir runs/mine",
        "flr evaluate --model runs/mine --data <your folder>",
    ]
    parameters = causal_lm(recommender.model).num_parameters()
    report = {
        "title": "Factorized latent reasoning: quickstart",
        "text": f"Five models of {parameters:,} parameters on generated data ({in_words(dataset)}), "
        f"the same budget for each, one of them reinforced by latent GRPO, {seconds:.0f} s altogether. Users mix three "
        "of four interests; the interest of every item is known.",
        "rows": outcome["rows"],
        "differences": outcome["differences"],
        "nmi": nmi,
        "images": images,
        "example": explanation.to_dict(),
        "next_steps": next_steps,
        "settings": {type(p).__name__: str(_changed(p)) for p in parts},
    }
    quickstart_report(report, out / "report.html")
    write_json(out / "quickstart.json", {"rows": outcome["rows"], "nmi": nmi, "seconds": round(seconds, 1)})
    steps = "\n  ".join(next_steps)
    voice.result(f"Wrote {out / 'report.html'}, {seconds:.0f} s altogether. How to go on:\n  {steps}")
    if options.open:
        webbrowser.open((out / "report.html").resolve().as_uri())
    emit({"report": str(out / "report.html"), "nmi": nmi, "seconds": seconds, **outcome}, rest.json)
    return 0


def _changed(options: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    fields = [f for f in dataclasses.fields(options) if f.init and f.default is not dataclasses.MISSING]
    return {f.name: getattr(options, f.name) for f in fields if getattr(options, f.name) != f.default}
