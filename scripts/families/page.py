"""docs/families.md, from the outcomes of the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flr.model.verify import Traits

PAGE = Path(__file__).resolve().parents[2] / "docs/families.md"
_HEAD = """# Families of models

This page is written by `python -m scripts.families`; see [training.md](training.md) for what patching is.

**A patched model is equal to the two-pass computation on {equal} of the {built} causal-LM families that
transformers {version} can build from their own configurations; the other {refused} are refused with a reason.**
{alone} more names are in its table of causal LMs, but transformers does not build these models alone.

Every family is built tiny, with random weights, and patched. These are compared:

- loss, logits and every gradient of a batch with two thoughts, padded on the right and, where the model has
  `left_padding`, on the left;
- the routers' auxiliary loss, where the model has experts;
- greedy `generate` with its cache and without;
- beam search and exhaustive scores over a catalogue under both scorings;
- the forward of a group of noisy thoughts with its gradients.

The bound in float32 is 2e-5 by norm. It is 2e-4 for scores of items and 1e-4 for gradients, where those below a
hundredth of the largest count as if they were that. The other side is computed row by row, without padding and without
a cache: a full forward for the states, the reasoner, the thought's embedding, a full forward again.

The sweep took {minutes:.0f} minutes of a shared machine. A family took {most:.0f} s and {memory} MiB at most.

## What is done where something does not hold

`patch_model` runs sixteen tokens through the model in some ten ways and keeps what it found as the patch's `traits`.
Where something does not hold, it says once what it does instead:

{meanings}

## Outcomes

| family | class | outcome | instead of what does not hold; or why not |
|---|---|---|---|
{rows}
"""


def write_page(found: dict[str, Any], version: str) -> None:
    """Write the page."""
    kinds = {k: sum(row["outcome"] == k for row in found.values()) for k in ("equal", "refused", "not built", "FAULT")}
    rows = []
    for family, row in sorted(found.items()):
        said = ", ".join(f"`{name}`" for name in row.get("fallbacks", [])) or row["reason"].removeprefix("model: ")
        if row.get("omitted"):
            said += " (the unpatched model has no gradient)"
        kind = "equal after fallback" if row.get("fallbacks") else row["outcome"]
        kind += ", auxiliary loss too" if row.get("experts") else ""
        rows.append(f"| {family} | {row['class']} | {kind} | {said.replace('|', '/')} |")
    nothing = Traits(**dict.fromkeys(vars(Traits()), False))
    meanings = [f"- `{name}`: {text}." for name, text in zip(vars(nothing), nothing.fallbacks(), strict=True)]
    text = _HEAD.format(
        equal=kinds["equal"],
        built=len(found) - kinds["not built"],
        refused=kinds["refused"] + kinds["FAULT"],
        alone=kinds["not built"],
        version=version,
        minutes=sum(row["seconds"] for row in found.values()) / 60,
        most=max(row["seconds"] for row in found.values()),
        memory=max(row.get("mebibytes", 0) for row in found.values()),
        meanings="\n".join(meanings),
        rows="\n".join(rows),
    )
    PAGE.write_text(text)
