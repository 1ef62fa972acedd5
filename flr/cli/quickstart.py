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
from .compare import METRICS, MODES, CompareOptions, compare, note_run, print_table, run_name, run_row, seed_difference
from .options import AugmentOptions, DataOptions, in_words
from .parsing import emit, parse

if TYPE_CHECKING:
    from flr.data import RecDataset
    from flr.recommend import Explanation
    from flr.train import SFTConfig

ABOUT = (
    "Train eight small models on generated data, reinforce one of them, compare, explain and report: some "
    "minutes on one CPU core."
)
REINFORCED = "flr-rl"
NAMES = {**MODES, REINFORCED: "latent GRPO on the model of mode flr"}
#: The modes in three lines of a terminal of 80 columns, so that all that is said fits on its 24.
_LEGEND = """\
none: no thought; anchor: one more token, the control; latentr3: one factor;
flr: K factors; -plain: without regularisers; -mixture: a thought each;
-rl: reinforced; offsets: K learned vectors that attend to nothing."""
_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "report_to": "none",
    "use_cpu": True,
    "logging_strategy": "epoch",
}


@dataclass
class QuickstartOptions:
    """How much of the tour."""

    output_dir: str = option("quickstart", "Folder for models, pictures and report.html.")
    quick: bool = option(False, "A tenth of the training: to see that everything runs.")
    seeds: int = option(1, "Seeds a mode.")
    open: bool = option(False, "Open the report in a browser at the end.")


def settings(
    options: QuickstartOptions,
) -> tuple[CompareOptions, DataOptions, AugmentOptions, ModelOptions, FLRConfig, SFTConfig]:
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
        reasoner_learning_rate=2e-3,
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
        folder = root / f"{REINFORCED}-{seed}"
        epochs = 1 if options.quick else 2
        args = LatentGRPOConfig(output_dir=str(folder), num_train_epochs=epochs, seed=seed, **_TRAINING)
        with voice.stage(run_name(REINFORCED, seed, options.seeds)):
            model, processor, _ = rl.train(rl.RLOptions(model=str(root / f"flr-{seed}")), data, args, dataset)
            shown: dict[str, Any] = {"name": REINFORCED, "progress": voice.shows_progress()}
            result = evaluate(model, processor, dataset.test, output_dir=folder / "test", **shown)
        results.append(result)
        outcome["rows"].append(run_row(REINFORCED, seed, result, time.perf_counter() - started))
        note_run(outcome["rows"][-1], "test", NAMES[REINFORCED], voice.passing)
    control = [EvalResult.load(root / f"anchor-{seed}" / outcome["split"]) for seed in range(options.seeds)]
    outcome["differences"][REINFORCED] = {m: list(seed_difference(control, results, m)) for m in METRICS}


def recovery(root: Path, mode: str, dataset: RecDataset) -> dict[str, Any]:
    """Agreement of the mode's factors with the planted interests, by attention and (``*_scores``) by scores."""
    from flr.data import RecProcessor
    from flr.explain import factor_interest
    from flr.model.checkpoint import from_pretrained

    folder = root / f"{mode}-0"
    model, processor = from_pretrained(folder), RecProcessor.from_pretrained(folder)
    known = (model, processor, dataset.test, dataset.catalogue.attributes["interest"])
    scored = factor_interest(*known, by="scores")
    return {**factor_interest(*known).to_dict(), "nmi_scores": scored.nmi, "chance_scores": scored.chance}


def pictures(rows: list[dict[str, Any]], explanation: Explanation, out: Path) -> None:
    """Draw what the report shows, for other uses: nothing without matplotlib."""
    from flr.report.drawing import WITHOUT, can_draw
    from flr.report.plots import plot_compare

    if not can_draw():
        voice.note(WITHOUT)
        return
    plot_compare(rows, out / "compare.png")
    explanation.heatmap(out / "attention.png")


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
    dataset = data.load()
    voice.note(f"Generated data: {in_words(dataset)}.")
    outcome = compare(*parts, dataset=dataset, say=voice.passing)
    reinforce(options, data, runs, dataset, outcome)
    print_table(outcome)

    voice.result(_LEGEND)
    nmi = {mode: recovery(runs, mode, dataset) for mode in ("flr", "flr-plain")}
    found = ", ".join(f"{mode} {agreement['nmi']:.3f}" for mode, agreement in nmi.items())
    chance = max(agreement["chance"] for agreement in nmi.values())
    voice.result(f"NMI of factors and interests: {found}; by chance {chance:.3f}.")

    longest = max(range(len(dataset.test)), key=lambda i: len(dataset.test[i].history))
    history = [dataset.catalogue.item_ids[i] for i in dataset.test[longest].history]
    recommender = Recommender.from_pretrained(runs / "flr-0")
    explanation = recommender.explain(history, k=5)
    pictures(outcome["rows"], explanation, out)
    seconds = time.perf_counter() - started
    model, example = f"--model {runs / 'flr-0'}", f"--history {' '.join(history[-3:])}"
    next_steps = [
        f"flr recommend {model} {example}",
        f"flr explain {model} {example}",
        "flr sft --data FOLDER --codec id --output_dir runs/mine",
    ]
    interests = len(set(dataset.catalogue.attributes["interest"].tolist()))
    parameters = causal_lm(recommender.model).num_parameters()
    report = {
        "title": "Factorized latent reasoning: quickstart",
        "text": f"Models of {len(MODES)} kinds on generated data ({in_words(dataset)}), all with the same budget, and "
        f"one of them reinforced by latent GRPO. The one with K factors has {parameters:,} parameters. All of it took "
        f"{seconds:.0f} s. Every user mixes some of {interests} interests; the interest of every item is known.",
        "rows": outcome["rows"],
        "names": NAMES,
        "differences": outcome["differences"],
        "nmi": nmi,
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
