"""What the study of docs/quality.md trains: do factors pay, beside their controls, on data of three shops?

Three settings are tried for each of seven models on instruments, one seed, and chosen by NDCG@10 on valid; then four
more seeds of what was chosen. After that other numbers of factors and refinements, no regularisers, semantic IDs, and
the two other data sets by their recipes, three seeds each. :func:`by_recipe` has parts of it for a CPU: the recipe with
other seeds for the mixture of factors and its two controls, the recipe with one change, and other data and codes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from .summary import REPEATED

#: Options beside the recipe, and how long a training takes beside that of the recipe.
SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {"argv": "", "cost": 1.0},
    "wide": {
        "argv": "--hidden_size 256 --intermediate_size 512 --num_train_epochs 8 --embedding_dropout 0.2 "
        "--output_dropout 0.2 --learning_rate 1e-3 --embedding_learning_rate 2e-3",
        "cost": 1.6,
    },
    "varied": {
        "argv": "--num_train_epochs 10 --embedding_dropout 0.2 --output_dropout 0.2 --augment_drop_item 0.2 "
        "--augment_single 0.15",
        "cost": 1.7,
    },
}
#: The recipe with a third of the rows read backwards, and epochs that read as many forwards.
REVERSED = "--augment_reverse 0.33 --num_train_epochs 8"
#: The recipe with a linear model as teacher, and more dropout.
TAUGHT = "--teacher linear --embedding_dropout 0.2 --output_dropout 0.2"
OPTIONS = {"recipe": ("", 1.0), "reversed": (REVERSED, 1.3), "taught": (TAUGHT, 1.3)}
TAUGHT_MODELS = ("anchor", "flr", "offsets-mixture", "flr-mixture")
#: name → recipe of instruments, options, relative length.
MODELS: dict[str, tuple[str, str, float]] = {
    "none": ("instruments", "--variant none", 0.8),
    "anchor": ("instruments", "--variant anchor", 0.9),
    "latentr3": ("instruments", "--variant latentr3", 1.0),
    "offsets": ("instruments", "--variant offsets", 0.95),
    "flr": ("instruments", "", 1.1),
    "offsets-mixture": ("instruments_mixture", "--variant offsets", 1.3),
    "flr-mixture": ("instruments_mixture", "", 1.4),
}
#: What is asked of a sum and of a mixture beside K = 4 and T = 1.
CHANGES = {
    "K=2": "--num_factors 2",
    "K=8": "--num_factors 8",
    "plain": "--orthogonality_weight 0 --diversity_weight 0 --sparsity_weight 0",
    "T=2": "--num_refinements 2",
    "K=3": "--num_factors 3",
    "K=6": "--num_factors 6",
    "T=3": "--num_refinements 3",
}
_SEEDS, _MORE_SEEDS = 5, 3
#: The recipes of instruments as they were before they had a teacher; "recipe" in this study is that.
_BEFORE = "--teacher none --embedding_dropout 0.1 --output_dropout 0.1"
_KEEP_LITTLE = "--save_strategy best --save_only_model true --save_total_limit 1 --logging_steps 200"
_PLAIN = "--cuda_graphs false"  # processes that share a GPU would each capture graphs of their own
_PART_OF_VALID = "--eval_max_users 8257"  # a third of instruments' chooses the epoch; all of valid the setting
_BOTH = [["evaluate", "--split", split, "--batch_size", "512"] for split in ("valid", "test")]
_IN_ONE_SUM = {"none": "--variant none", "anchor": "--variant anchor", "flr": ""}
_MIXED = {
    "offsets-mixture": "--variant offsets --aggregation mixture",
    "flr-mixture": "--aggregation mixture",
}
#: What one-token items call for, docs/training.md.
_LATEST = {"offsets-mixture": "--anchor last", "flr-mixture": "--anchor last"}


def study(data: str, examples: str, extra: str = "") -> dict[str, Any]:
    """The list of jobs, for prepared data in the folder ``data`` and recipes in ``examples``.

    ``extra`` are options for every training.
    """
    folders = {name: f"{data}/{name}" for name in ("instruments", "amazon-cds", "amazon-office")}
    job = _maker(folders, examples, extra)
    jobs = []
    for place, setting in enumerate(SETTINGS):
        for model, (recipe, options, cost) in MODELS.items():
            about = {"variant": model, "setting": setting, "seed": 0, "cost": cost, "tune": True, "beside": True}
            tags = {"data": "instruments", "codec": "id"}
            name = f"{model}-{setting}-0"
            jobs.append(job(name, 10 + place, recipe, "instruments", f"{options} {_PART_OF_VALID}", **about, tags=tags))
    for seed in range(1, _SEEDS):
        for model, (recipe, options, cost) in MODELS.items():
            about = {"variant": model, "setting": "best", "seed": seed, "cost": cost, "beside": True}
            tags = {"data": "instruments", "codec": "id"}
            options = f"{options} {_PART_OF_VALID}"
            jobs.append(job(f"{model}-best-{seed}", 20 + seed, recipe, "instruments", options, **about, tags=tags))
    seeds, models = range(_MORE_SEEDS), ("flr-mixture", "flr")
    jobs += _changed(job, seeds, models, setting="best")
    jobs += _semantic_ids(job, seeds, ("anchor", "flr", "flr-mixture", "none"))
    jobs += _other_shops(job, seeds, ("amazon-cds", "amazon-office"))
    settings = {name: {**own, "argv": shlex.split(own["argv"])} for name, own in SETTINGS.items()}
    return {"settings": settings, "data": list(folders.values()), "jobs": jobs}


def by_recipe(part: str, data: str, examples: str, extra: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A part of the list without any tuning, seed by seed.

    ``part`` is "repeats" (the mixture of factors and its controls), "reversed" (those with :data:`REVERSED`), "taught"
    (those and one sum of factors, with :data:`TAUGHT`), "changes" (the mixture of factors with other K and T, and
    without regularisers) or "others" (instruments by semantic IDs, and the two other shops).
    """
    folders = {name: f"{data}/{name}" for name in ("instruments", "amazon-cds", "amazon-office")}
    job = _maker(folders, examples, extra)
    if part == "others":
        jobs = _other_shops(job, seeds, ("amazon-cds", "amazon-office"))
        jobs += _semantic_ids(job, seeds, ("anchor", "flr-mixture"))
    elif part == "changes":
        jobs = _changed(job, seeds, ("flr-mixture",), setting="recipe")
    else:
        setting, models = part if part in OPTIONS else "recipe", TAUGHT_MODELS if part == "taught" else REPEATED
        jobs = [_repeated(job, model, seed, 10 * n, setting) for n, seed in enumerate(seeds, 1) for model in models]
    used = {one["tags"]["data"] for one in jobs}
    return {
        "settings": {name: {"argv": shlex.split(own), "cost": cost} for name, (own, cost) in OPTIONS.items()},
        "data": [folders[name] for name in folders if name in used],
        "jobs": jobs,
    }


def _repeated(job: Any, model: str, seed: int, priority: int, setting: str) -> dict[str, Any]:
    recipe, options, cost = MODELS[model]
    about = {"variant": model, "setting": setting, "seed": seed, "cost": cost, "beside": True}
    about["tags"] = {"data": "instruments", "codec": "id"}
    options, priority = f"{options} {_PART_OF_VALID}", priority + list(MODELS).index(model)
    return job(f"{model}-{setting}-{seed}", priority, recipe, "instruments", options, **about)


def _maker(folders: dict[str, str], examples: str, extra: str) -> Callable[..., dict[str, Any]]:
    """What makes a job of its name, priority, recipe, data set and options."""

    def job(name: str, priority: int, recipe: str, shop: str, options: str, **more: Any) -> dict[str, Any]:
        texts = (
            f"--config {examples}/{recipe}.yaml --data {folders[shop]}",
            _KEEP_LITTLE,
            _BEFORE if shop == "instruments" else "",
            options,
            _PLAIN,
            extra,
        )
        argv = ["sft", *shlex.split(" ".join(texts))]
        return {"name": name, "priority": priority, "kind": "flr", "argv": argv, "evaluate": _BOTH, **more}

    return job


def _changed(job: Any, seeds: Sequence[int], models: Sequence[str], setting: str) -> list[dict[str, Any]]:
    """Other K and T and no regularisers; "best" is the setting that was chosen for K = 4 and T = 1."""
    jobs = []
    for place, (change, options) in enumerate(CHANGES.items()):
        for model in models:
            recipe, _, cost = MODELS[model]
            for seed in seeds:
                about = {"variant": model, "setting": setting, "seed": seed, "cost": cost, "beside": True}
                tags = {"data": "instruments", "codec": "id", "change": change}
                name, priority = f"{model}-{change}-{seed}", 41 + 10 * seed + place
                about |= {"last": shlex.split(options), "tags": tags}
                jobs.append(job(name, priority, recipe, "instruments", _PART_OF_VALID, **about))
    return jobs


def _semantic_ids(job: Any, seeds: Sequence[int], models: Sequence[str]) -> list[dict[str, Any]]:
    """The published codes of instruments: longer prompts, a beam search, no mixture with item-kNN."""
    jobs = []
    for seed in seeds:
        for model in models:
            recipe, own, cost = MODELS[model]
            options = f"{own} --codec sid --normalisation catalogue --eval_max_users 2064"
            about = {"variant": model, "seed": seed, "cost": 3.0 * cost, "memory": 6.0, "after_tuning": True}
            tags = {"data": "instruments", "codec": "sid"}
            jobs.append(job(f"sid-{model}-{seed}", 48 + 10 * seed, recipe, "instruments", options, **about, tags=tags))
    return jobs


def _other_shops(job: Any, seeds: Sequence[int], shops: Sequence[str]) -> list[dict[str, Any]]:
    """Amazon CDs, one token an item, and Office, semantic IDs: by time, by their recipes."""
    jobs, codecs = [], {"amazon-cds": "id", "amazon-office": "sid"}
    for seed in seeds:
        for shop, codec in ((shop, codecs[shop]) for shop in shops):
            for model, options in {**_IN_ONE_SUM, **_MIXED}.items():
                latest = _LATEST.get(model, "") if codec == "id" else ""
                about = {"variant": model, "seed": seed, "cost": 1.0}
                tags = {"data": shop, "codec": codec}
                name = f"{shop}-{model}-{seed}"
                jobs.append(job(name, 45 + 10 * seed, shop, shop, f"{options} {latest}", **about, tags=tags))
    return jobs
