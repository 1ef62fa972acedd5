"""Data of two times for ``flr update``, a call of it, and what it leaves."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from flr.cli import main
from flr.data import Catalogue, RecDataset, planted_dataset
from flr.data.growth import joined, replaced
from scripts.stream_study import by_time, over_used_items

WHOLE = planted_dataset(num_items=60, num_users=80, split="time", seed=2)
SFT = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "3e-3"]
SMALL = ["--hidden_size", "32", "--intermediate_size", "32", "--max_steps", "40", "--eval_strategy", "no"]
SMALL += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "32"]
UPDATE = ["--max_steps", "6", "--per_device_train_batch_size", "16", "--save_steps", "2"]


def catalogue():
    """Of the last eight items, which come later, two share title and codes with a known one that was alone in both."""
    whole = WHOLE.catalogue
    twins = [5 if item in (55, 57) else item for item in range(len(whole))]
    titles = [whole.titles[item] for item in twins]
    return Catalogue(whole.item_ids, titles, [whole.sids[item] for item in twins])


def split():
    """Old rows over their items; new rows over theirs, in another order: eight are new, some are absent."""
    rows = by_time(joined(joined(WHOLE.train, WHOLE.valid), WHOLE.test))
    late = rows.targets >= 52
    late |= np.array([(row.history >= 52).any() for row in rows])
    old, new = rows.select(~late), rows.select(late)
    learned, newest = new.select(np.arange(len(new) - 40)), new.select(np.arange(len(new) - 40, len(new)))
    known = over_used_items("old", catalogue(), old, old.select(np.arange(9)))
    later = over_used_items("new", catalogue(), learned, newest)
    order = np.random.default_rng(0).permutation(len(later.catalogue))
    items = later.catalogue
    mixed = Catalogue(*([column[item] for item in order] for column in (items.item_ids, items.titles, items.sids)))
    places = np.argsort(order)
    parts = [replaced(part, places) for part in (later.train, later.valid, later.test)]
    return known, RecDataset(mixed, *parts, "new")


def updated(models, codec: str, tmp_path, *more: str, model=None) -> tuple[int, dict]:
    out = tmp_path / "out"
    options = ["--data", str(models / "new"), "--replay", str(models / "old"), "--output_dir", str(out)]
    model = str(models / codec if model is None else model)
    status = main(["update", "--model", model, *options, *SFT, *UPDATE, *more])
    return status, json.loads((out / "flr_update.json").read_text()) if out.is_dir() else {}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def twice(folder, name="model.safetensors") -> None:
    """Other weights in the place of a model's."""
    save_file({key: 2 * value for key, value in load_file(folder / name).items()}, folder / name, {"format": "pt"})


def answering(*answers):
    """In place of ``decide``: these answers, one a call."""
    kept = iter(answers)
    figures = {"all": {"difference": [0.0, 0.0, 0.0, 0.0]}}
    return lambda *_: (found := next(kept), f"{'kept' if found else 'not kept'}: a test says so", figures)
