"""Folders as a training leaves them, without the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flr.evaluate import EvalResult

LIKES = [
    {
        "items": [{"item_id": f"i{k}", "title": f"Item <{k}>", "lift": 2.5, "count": 9}],
        "words": [{"word": "blue", "lift": 1.5, "count": 4}],
    }
    for k in range(2)
]


def log(factor=2.0):
    """A log of four steps with two evaluations."""
    lines = [{"step": s, "epoch": s / 2, "loss": factor / s, "orthogonality": 0.1 / s} for s in range(1, 5)]
    for step in (2, 4):
        gates = {f"eval_gate_{k}": 0.5 for k in (1, 2)} | {f"eval_attention_entropy_{k}": 0.7 for k in (1, 2)}
        lines.append(
            {"step": step, "eval_hr@10": step / 10, "eval_ndcg@10": step / 20, "eval_attention_overlap": 0.3, **gates}
        )
    return lines


def run_folder(folder: Path, found: float, users: int = 60) -> Path:
    """A finished run whose model puts the share ``found`` of the targets first."""
    folder.mkdir(parents=True)
    state = {"log_history": log(), "global_step": 4, "epoch": 2.0, "best_metric": 0.2}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    summary = {"variant": "flr", "train_rows": 100, "seconds": 3.0, "tokens_per_second": 1234.0}
    (folder / "flr_run.json").write_text(json.dumps({"version": 1, "settings": {}, "summary": summary}))
    (folder / "factors.json").write_text(json.dumps({"factors": LIKES}))
    ranks = np.where(np.arange(users) < found * users, 1, 0)
    EvalResult(
        name="flr",
        users=[f"u{i}" for i in range(users)],
        targets=np.arange(users) % 9,
        ranks={"item": ranks, "title": ranks},
        items=np.zeros((users, 20), np.int64),
        scores=np.zeros((users, 20), np.float32),
        num_items=50,
        traits={"history_length": np.arange(users) % 12, "target_popularity": np.arange(users) % 5},
    ).save(folder / "valid")
    return folder
