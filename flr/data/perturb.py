"""Histories that were damaged on purpose, to see how much a ranking depends on them.

    drop      each item is left out with probability s
    replace   each item becomes one drawn uniformly from the catalogue, with probability s
    shuffle   a share s of the places, drawn at random, exchange their items at random
    truncate  the earliest share s of the items is left out
    poison    ⌈s·n⌉ items of the most popular hundredth of the catalogue are put in at random places

A history that has an item keeps at least its latest one. Draws are a function of seed, kind, severity and the rows: two
models that are compared see the same histories.
"""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import numpy as np

from .csr import CSR

Perturbation = Literal["drop", "replace", "shuffle", "truncate", "poison"]
PERTURBATIONS: tuple[str, ...] = get_args(Perturbation)


def perturb(
    histories: CSR, kind: str, severity: float, *, popularity: np.ndarray, max_history: int, seed: int = 0
) -> CSR:
    """``histories`` as ``kind`` leaves them.

    Args:
        histories: of B users; only the latest ``max_history`` items of each count and come back (and those put in).
        kind: one of :data:`PERTURBATIONS`. severity: s in 0..1; 0 changes nothing.
        popularity: float [C], how often each item is a training target.
        max_history: of the model, so that damage is not hidden in items that it does not read.
        seed: of the draws.

    Raises:
        ValueError: an unknown kind, a severity out of range.

    Example:
        >>> given = CSR.from_rows([[0, 1, 2, 3], [4]])
        >>> perturb(given, "truncate", 0.5, popularity=np.ones(5), max_history=10).row(0).tolist()
        [2, 3]
    """
    if kind not in PERTURBATIONS:
        raise ValueError(f"kind: expected one of {', '.join(PERTURBATIONS)}, got {kind!r}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity: expected a number in 0..1, got {severity}")
    starts = np.maximum(histories.offsets[:-1], histories.offsets[1:] - max_history)
    kept = histories.slice(starts, histories.offsets[1:])
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), round(severity * 1e6)])
    size = len(popularity)
    popular = np.argsort(-popularity, kind="stable")[: max(1, size // 100)]
    rows = []
    for place in range(len(kept.offsets) - 1):
        items = kept.row(place)
        rows.append(_one(items, kind, severity, size, popular, rng) if len(items) else items)
    return CSR.from_rows(rows)


def _one(
    items: np.ndarray, kind: str, severity: float, size: int, popular: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    if kind == "drop":
        stays = rng.random(len(items)) >= severity
        stays[-1] |= not stays.any()
        return items[stays]
    if kind == "replace":
        drawn = rng.integers(0, size, len(items)).astype(items.dtype)
        return np.where(rng.random(len(items)) < severity, drawn, items)
    if kind == "shuffle":
        chosen = np.sort(rng.permutation(len(items))[: round(severity * len(items))])
        changed = items.copy()
        changed[chosen] = items[rng.permutation(chosen)]
        return changed
    if kind == "truncate":
        return items[min(int(severity * len(items)), len(items) - 1) :]
    drawn = rng.choice(popular, int(np.ceil(severity * len(items)))).astype(items.dtype)
    return np.insert(items, rng.integers(0, len(items) + 1, len(drawn)), drawn)
