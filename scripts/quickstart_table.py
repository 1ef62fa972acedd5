"""What ``flr quickstart`` found, as a table of docs/quality.md.

    flr quickstart --seeds 3 && python -m scripts.quickstart_table --quickstart quickstart
    python -m scripts.quickstart_table                                             # docs/quality.md alone

Results go to docs/results/quickstart.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from flr.cli.quickstart import NAMES
from flr.files import read_json, write_json

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "docs/results/quickstart.json", ROOT / "docs/quality.md"
METRICS = ("hr@10", "ndcg@10")


def result(report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a ``quickstart.json``."""
    rows = [{**row, "metrics": {m: round(row["metrics"][m], 6) for m in METRICS}} for row in report["rows"]]
    kept = [{name: row[name] for name in ("mode", "seed", "metrics")} for row in rows]
    nmi = {mode: {name: round(found[name], 6) for name in ("nmi", "chance")} for mode, found in report["nmi"].items()}
    return {"rows": kept, "nmi": nmi}


def span(values: list[float]) -> str:
    """Mean, and of several the lowest and the highest; nothing of none."""
    ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{ends}" if values else ""


def table(report: dict[str, Any]) -> str:
    """What ``flr quickstart`` found: means over seeds with the lowest and the highest, and NMI of the first seed."""
    lines = ["| mode | what it is | seeds | HR@10 | NDCG@10 | NMI, by chance |", "|---|---|---|---|---|---|"]
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        runs = [row["metrics"] for row in report["rows"] if row["mode"] == mode]
        spans = [span([run[metric] for run in runs]) for metric in METRICS]
        found = report["nmi"].get(mode)
        agreement = f"{found['nmi']:.3f}, {found['chance']:.3f}" if found else ""
        lines.append(f"| {mode} | {NAMES[mode]} | {len(runs)} | {' | '.join(spans)} | {agreement} |")
    lines.append("\nThe test split: means over seeds, with the lowest and the highest; NMI of seed 0.")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table as the results say."""
    return filled(text, "quality:quickstart", table(read_json(RESULT, 1 << 24)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="Take over what flr quickstart left in this folder.")
    args = parser.parse_args()
    if args.quickstart:
        write_json(RESULT, result(read_json(args.quickstart / "quickstart.json", 1 << 24)))
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
