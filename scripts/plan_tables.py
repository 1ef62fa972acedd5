"""The tables of docs/scale.md about costs, from ``flr plan`` and the results in bench/results.

python -m scripts.plan_tables            # write them
python -m scripts.plan_tables --check    # exit 1 where they are stale
"""

from __future__ import annotations

import sys
from pathlib import Path

from flr.cli.plan import PlanOptions, plan

from .marks import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/scale.md"
USERS, ITEMS, DEVICES = (1e6, 1e8), (1e4, 1e5, 1e6, 1e7), ("cpu", "h200")
MODEL = {"hidden": 1536, "layers": 28, "vocabulary": 151_936}
VARIED = (("K", {"factors": 16}), ("T", {"refinements": 4}), ("W", {"beams": 50}), ("history", {"history": 100}))


def tables() -> str:
    """In Markdown."""
    lines = []
    for device in DEVICES:
        title = plan(PlanOptions(**MODEL, device=device))["device"]
        devices = "cores" if device == "cpu" else "GPUs"
        lines += [f"Device-hours a day, and machines of 8 {devices} that work all day, {title}:", ""]
        many = " | ".join(f"{users:,.0f} users: hours, machines" for users in USERS)
        lines += [f"| items | tokens an item | ms a user | {many} | trie |", "|---|---|---|---|---|---|"]
        for items in ITEMS:
            tokens = 3 if items <= 1e5 else 4
            about = {**MODEL, "device": device, "items": items, "item_tokens": tokens, "per_machine": 8}
            found = [plan(PlanOptions(**about, users=users)) for users in USERS]
            cells = [f"{one['device_hours_a_day']:,.1f}, {one['machines']:,}" for one in found]
            trie = f"{found[0]['memory']['trie_bytes'] / 1e6:,.0f} MB"
            ms = f"{1e3 * found[0]['seconds_a_user']:,.1f}"
            lines.append(f"| {items:,.0f} | {tokens} | {ms} | {' | '.join(cells)} | {trie} |")
        base = plan(PlanOptions(**MODEL, device=device))["seconds_a_user"]
        changes = []
        for name, change in VARIED:
            seconds = plan(PlanOptions(**MODEL, device=device, **change))["seconds_a_user"]
            changes.append(f"{name} = {next(iter(change.values()))} {seconds / base:.2f}")
        lines += ["", f"Times as long with {', '.join(changes)}.", ""]
    return "\n".join(lines).rstrip()


def main() -> int:
    before = PAGE.read_text()
    after = filled(before, "scale:plan", tables())
    if "--check" in sys.argv[1:]:
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
