"""What ``scripts/rl_sweep.py`` found, as tables of docs/rl.md.

python -m scripts.rl_tables
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flr.files import read_json

from .marks import filled, with_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/rl.md"
REWARDS = {"log_likelihood": "log-likelihood", "ndcg@10": "NDCG@10"}
SPLITS = ("valid", "test")
#: Of amazon-cds: split, name in the file, in the table, digits.
LINES = (
    ("valid", "target_logprob", "log-likelihood", 3),
    ("test", "target_logprob", "log-likelihood", 3),
    ("valid", "ndcg@10, views 0", "NDCG@10", 4),
    ("test", "ndcg@10, views 0", "NDCG@10", 4),
    ("valid", "ndcg@10, views 1", "NDCG@10, views", 4),
    ("test", "ndcg@10, views 1", "NDCG@10, views", 4),
)


def change(cell: dict[str, Any], digits: int) -> str:
    """The mean change with its interval."""
    found = cell["difference"]
    return with_interval(found["mean"], found["low"], found["high"], "+", digits)


def by_seed(cell: dict[str, Any], digits: int) -> str:
    """The change of every seed."""
    return " ".join(f"{b - a:+.{digits}f}" for a, b in zip(cell["before"], cell["after"], strict=True))


def planted(report: dict[str, Any]) -> str:
    """Advantages and rates on generated data."""
    lines = [
        "| advantage | rate | valid log-likelihood, by seed | valid NDCG@10, by seed | test log-likelihood, 95 % "
        "| test NDCG@10, 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        valid, test = row["valid"], row["test"]
        cells = [by_seed(valid["target_logprob"], 3), by_seed(valid["ndcg@10"], 4)]
        cells += [change(test["target_logprob"], 3), change(test["ndcg@10"], 4)]
        lines.append(f"| {row['advantage']} | {row['rate']} | {' | '.join(cells)} |")
    first = report["rows"][0]
    valid, test = ({name: first[split][name]["before"] for name in ("target_logprob", "ndcg@10")} for split in SPLITS)
    likelihood = " ".join(f"{x:.3f}" for x in valid["target_logprob"])
    ranking = " ".join(f"{x:.4f}" for x in valid["ndcg@10"])
    began = f"{likelihood} and {ranking} on valid, and NDCG@10 at {np.mean(test['ndcg@10']):.4f} on test (mean)"
    lines.append(f"\nSeeds {' '.join(map(str, first['seeds']))}. They began at {began}.")
    return "\n".join(lines)


def cds(report: dict[str, Any]) -> str:
    """Rewards on Amazon CDs."""
    lines = ["| reward | | before, by seed | change, by seed | mean, 95 % |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        reward = REWARDS[row["reward"]]
        for split, name, shown, digits in LINES:
            cell = row[split][name]
            before = " ".join(f"{x:.{digits}f}" for x in cell["before"])
            lines.append(
                f"| {reward} | {split} {shown} | {before} | {by_seed(cell, digits)} | {change(cell, digits)} |"
            )
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as the results say."""
    for name, table in (("planted", planted), ("cds", cds)):
        text = filled(text, f"rl:{name}", table(read_json(RESULTS / f"rl_{name}.json", 1 << 24)))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
