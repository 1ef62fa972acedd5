"""What a model is updated from, and the rule by which an update is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flr.data import Catalogue, Interactions, RecDataset
from flr.data.events import unit_of
from flr.data.growth import Growth, grow_catalogue, joined, replaced
from flr.evaluate import EvalResult
from flr.evaluate.metrics import Difference, paired_difference, row_metrics

METRIC = "ndcg@10"


@dataclass(frozen=True, eq=False)
class Stream:
    """What a model is updated from, over the catalogue of :class:`Growth`.

    Attributes:
        growth: the model's catalogue with the new items.
        fresh: new rows, with their times.
        train: new rows, then rows of the replay; times only where all have them.
        everything: new rows, then all old ones.
        valid: the newest rows, which decide.
        replay_rows: how many of ``train`` are of the replay.
        notes: lines for the user.
    """

    growth: Growth
    fresh: Interactions
    train: Interactions
    everything: Interactions
    valid: Interactions
    replay_rows: int
    notes: list[str] = field(default_factory=list)

    @property
    def new_rows(self) -> int:
        """How many of ``train`` are new."""
        return len(self.fresh)


def stream(
    known: Catalogue,
    codec: str,
    dataset: RecDataset,
    replay: RecDataset | None = None,
    *,
    share: float = 0.5,
    since: float | None = None,
    valid_rows: int | None = None,
    seed: int = 0,
) -> Stream:
    """New rows and a sample of old ones, in a catalogue that begins with the model's.

    Args:
        known: the model's items.
        codec: how they are written.
        dataset: its ``train`` is new, its ``valid`` newer, and its items are merged into ``known``.
        replay: old data, all of whose items are known or in ``dataset``; its ``train`` is drawn from.
        share: of ``train`` that is drawn from old rows, in [0, 1), where there are so many.
        since: seconds since 1970, or in the times' own unit where their size shows none; rows of ``dataset.train``
            before are old.
        valid_rows: take so many of ``valid`` only, evenly spread.
        seed: of the draw.

    Raises:
        ValueError: no new or no valid rows, ``since`` without times, items or codes that do not fit.
    """
    growth = grow_catalogue(known, dataset.catalogue, codec == "sid")
    fresh, old = replaced(dataset.train, growth.places), None
    if since is not None:
        if fresh.timestamps is None:
            raise ValueError(f"since: expected rows with times, got none in {dataset.name!r}")
        late = fresh.timestamps >= since * (unit_of(fresh.timestamps) or 1)
        fresh, old = fresh.select(late), fresh.select(~late)
    if not len(fresh) or not len(dataset.valid):
        wanted = "new rows to learn (train) and newer ones that decide (valid)"
        raise ValueError(f"data: expected {wanted}, got {len(fresh)} and {len(dataset.valid)}")
    if replay is not None:
        rows = _known_rows(replay, growth.catalogue)
        old = rows if old is None else joined(rows, old)
    notes = _notes(growth, dataset)
    number = round(len(fresh) * share / (1 - share))
    if old is None or not len(old):
        notes += ["no old rows beside the new ones: a model may forget what it is not shown"] * bool(number)
        old = fresh.select([])
    drawn = np.sort(np.random.default_rng(seed).permutation(len(old))[:number])
    mixture = joined(fresh, old.select(drawn))
    valid = replaced(dataset.valid, growth.places).spread(valid_rows)
    return Stream(growth, fresh, mixture, joined(fresh, old), valid, len(drawn), notes)


def _known_rows(replay: RecDataset, catalogue: Catalogue) -> Interactions:
    """The training rows of older data, over ``catalogue``."""
    index = {item_id: place for place, item_id in enumerate(catalogue.item_ids)}
    places = np.array([index.get(item_id, -1) for item_id in replay.catalogue.item_ids], np.int64)
    used = np.unique(np.concatenate([replay.train.histories.values, replay.train.targets]))
    if (lost := used[places[used] < 0]).size:
        got = f"{replay.catalogue.item_ids[lost[0]]!r} and {len(lost) - 1} others"
        raise ValueError(f"replay: expected rows over items of the model or of data, got {got}")
    return replaced(replay.train, places)


def _notes(growth: Growth, dataset: RecDataset) -> list[str]:
    notes = []
    if growth.absent:
        notes.append(f"{growth.absent:,} items that the data no longer have stay in the catalogue")
    if growth.retitled:
        notes.append(f"{growth.retitled:,} items have another title in the data and keep theirs")
    if growth.left_out:
        notes.append(f"attributes that known items lack are left out: {', '.join(growth.left_out)}")
    train, valid = dataset.train.timestamps, dataset.valid.timestamps
    if train is not None and valid is not None and len(train) and valid.min() < train.max():
        notes.append("some rows that decide (valid) are older than some that are learned; --split time has no such")
    return notes


def decide(before: EvalResult | None, after: EvalResult, known: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
    """Whether an update is kept, why, and the figures.

    A target that the old model does not know counts against it as not found: there the update can only gain. So what
    decides is the rows whose target both know. The update is kept unless it is worse there beyond chance: unless the
    95 % interval of the difference of NDCG@10, a bootstrap over users, lies below 0 as a whole.

    Args:
        before: of the old model, on the rows with known targets; None where there are none.
        after: of the updated model, on all rows.
        known: bool [rows] of ``after``, the rows of ``before``.

    Example:
        >>> decide(None, EvalResult("model", ["u"], np.array([3]), {k: np.array([1]) for k in ("item", "title")},
        ...     np.array([[3]]), np.zeros((1, 1), np.float32), 4, samples=10), np.array([False]))[1]
        'kept: the old model knows none of the 1 targets'
    """
    values = row_metrics(after.ranks["item"])[METRIC]
    old = np.zeros(len(values))
    if before is not None:
        old[known] = row_metrics(before.ranks["item"])[METRIC]
    figures: dict[str, Any] = {}
    differences: dict[str, Difference] = {}
    for name, rows in (("all", np.ones(len(known), bool)), ("known", known), ("new", ~known)):
        if rows.any():
            users = np.array(after.users, dtype=object)[rows]  # not as wide as the longest
            differences[name] = paired_difference(old[rows], values[rows], users, 1000)
            means = {"before": float(old[rows].mean()), "after": float(values[rows].mean())}
            figures[name] = {"rows": int(rows.sum()), **means, "difference": list(differences[name])}
    if before is None:
        return True, f"kept: the old model knows none of the {len(known)} targets", figures
    found = differences["known"]
    what = f"NDCG@10 of the {known.sum():,} newest rows with known targets"
    size = f"changed by {found.mean:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}"
    kept = found.high >= 0
    rule = "which does not lie below 0" if kept else "all of which lies below 0"
    return kept, f"{'kept' if kept else 'not kept'}: {what} {size}, {rule}", figures
