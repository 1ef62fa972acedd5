"""What ``scripts/scoring_quality.py`` found on test, as a table of docs/training.md.

python -m scripts.scoring_table
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flr.files import read_json

from .marks import filled, with_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/training.md"
#: What was trained, by the file of its results.
TRAINED = {
    "scoring_office_whole_test": "office, semantic IDs, whole prompt, 16 epochs",
    "scoring_office_test": "office, semantic IDs, views, 5 epochs",
    "scoring_cds_title_test": "cds, titles, whole prompt, 6 epochs",
}
WAYS = ("full/full", "catalogue/catalogue", "full/catalogue", "catalogue/full")
NAME = "ndcg@10"


def line(what: str, report: dict[str, Any]) -> str:
    """One row: trained and scored alike, their difference, scored by the other, and the ratio of times."""
    alike = []
    for way in WAYS[:2]:
        found = report["trained/scored"][way]
        alike.append(with_interval(found["mean"][NAME], *found["interval"][NAME]))
    mean, low, high, _ = report["differences"]["catalogue/catalogue - full/full"][NAME]
    other = [f"{report['trained/scored'][way]['mean'][NAME]:.4f}" for way in WAYS[2:]]
    times = report["seconds full / catalogue"].values()
    cells = [what, *alike, with_interval(mean, low, high, "+"), *other, f"{min(times):.1f} to {max(times):.1f}"]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Test NDCG@10 of every training."""
    header = ["", "`full`", "`catalogue`", "`catalogue` less `full`", "`full`, scored `catalogue`"]
    header += ["`catalogue`, scored `full`", "times as long, scored `full`"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(
        lines + [line(what, read_json(RESULTS / f"{name}.json", 1 << 20)) for name, what in TRAINED.items()]
    )


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "training:scoring", table())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
