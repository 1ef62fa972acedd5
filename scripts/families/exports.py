"""Which families ``flr export`` takes: every one that patching takes, exported and compared with the model.

    python -m scripts.families.exports          # those without an outcome yet, then the block in docs/engines.md
    python -m scripts.families.exports --page   # the block alone

Outcomes are kept in docs/results/exports.json. Windows are 64 here, not 6, so that a prompt fits into them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from flr.files import write_json
from flr.model.backbone import cache_of
from flr.model.export import export_prompt

from ..marks import filled
from . import __main__ as sweep
from . import tiny
from .check import patched, positions_of

ROOT = Path(__file__).resolve().parents[2]
RESULT, PAGE = ROOT / "docs/results/exports.json", ROOT / "docs/engines.md"
THOUGHTS, SIZES, BOUND = 2, ((1, 1), (2, 13), (4, 6)), 1e-5
_WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")
_WINDOWS += ("local_attention",)


def difference(run: Any, model: Any, ids: Tensor) -> float:
    """The largest of an output, relative to the largest value of its kind; even rows are padded on the left."""
    mask = torch.ones_like(ids)
    mask[::2, : ids.shape[1] // 2] = 0
    narrowed = mask.bool() & (ids % 3 > 0)
    behind = (0, THOUGHTS)
    longer = pad(mask, behind, value=1)
    with torch.no_grad():
        got = run(ids, mask, narrowed)
        out = model(
            input_ids=pad(ids, behind, value=tiny.THOUGHT),
            attention_mask=longer,
            reasoner_mask=pad(narrowed, behind, value=False),
            use_cache=True,
            **positions_of(model, longer),
        )
    cache, seen = cache_of(out), longer[:, None, :, None].bool()
    layers = getattr(cache, "self_attention_cache", cache).layers
    pairs = [(got["logits"], out.logits[:, -1])]
    pairs += [(a * seen, b.keys * seen) for a, b in zip(got["keys"], layers, strict=True)]
    pairs += [(a * seen, b.values * seen) for a, b in zip(got["values"], layers, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def outcome(family: str) -> dict[str, Any]:
    """What comes of one family: equal, refused, or a fault."""
    with mock.patch.dict(tiny._SIZES, dict.fromkeys(_WINDOWS, 64)):
        model = patched(family, THOUGHTS).eval()
    try:
        run = export_prompt(model).module()
    except ValueError as error:
        return {"outcome": "refused", "reason": str(error)}
    torch.manual_seed(0)
    try:
        worst = max(difference(run, model, torch.randint(3, tiny.VOCAB - 1, size)) for size in SIZES)
    except Exception as error:
        return {"outcome": "FAULT", "reason": f"{type(error).__name__}: {error}"}
    kind = "equal" if worst < BOUND else "FAULT"
    return {"outcome": kind, "reason": "" if kind == "equal" else f"differs by {worst:.1e}", "difference": worst}


def block(found: dict[str, Any]) -> str:
    """The sentences of docs/engines.md."""
    kinds = Counter(row["outcome"] for row in found.values())
    equal = [row["difference"] for row in found.values() if row["outcome"] == "equal"]
    reasons: dict[str, list[str]] = {}
    for family, row in sorted(found.items()):
        if row["outcome"] != "equal":
            reasons.setdefault(_short(row["reason"]), []).append(family)
    rows = sorted(reasons.items(), key=lambda x: (-len(x[1]), x[0]))
    lines = [
        f"Of {len(found)} families that were tried ({_patched()} can be patched), {kinds['equal']} are exported, tiny "
        f"and with two thoughts, and differ from the model by {max(equal):.0e} of an output's",
        "largest value at most (`python -m scripts.families.exports`). The others, by the traits of "
        "[families.md](families.md):",
        "",
        "| why not | families |",
        "|---|---|",
        *(f"| {reason} | {len(names)}: {', '.join(names)} |" for reason, names in rows),
    ]
    return "\n".join(lines)


def _patched() -> int:
    """Families of docs/families.md that are not refused."""
    every = json.loads(sweep.RESULTS.read_text())["families"]
    return sum(row["outcome"] == "equal" for row in every.values())


def _short(reason: str) -> str:
    """A reason without the family's name: the traits that it lacks, or what torch.export says."""
    if found := re.search(r" without (.*) \(docs/families.md\)", reason):
        return "without " + " and ".join(f"`{name}`" for name in found[1].split(" and "))
    told = re.sub(r"^model: expected one that torch\.export takes, got \w+: ", "", reason)
    return f"torch.export: {told.split(' (unhinted')[0]}".replace("|", "/")


def main() -> int:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found: dict[str, Any] = kept.get("families", {}) if kept.get("transformers") == transformers.__version__ else {}
    every = json.loads(sweep.RESULTS.read_text())["families"]
    todo = [name for name, row in every.items() if row["outcome"] == "equal" and name not in found]
    for n, family in enumerate([] if "--page" in sys.argv else todo, 1):
        row = sweep.in_a_process(family, outcome)
        found[family] = {name: row[name] for name in ("outcome", "reason", "difference") if name in row}
        print(f"{n}/{len(todo)} {family}: {found[family]} ({row['seconds']} s)", file=sys.stderr, flush=True)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        write_json(RESULT, {**versions, "families": dict(sorted(found.items()))})
    PAGE.write_text(filled(PAGE.read_text(), "engines:exports", block(found)))
    return int(any(row["outcome"] == "FAULT" for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
