"""Growth laws from the rows of suite ``scaling``: exponents by least squares on logarithms, and what fits a memory.

A row of that suite carries in its shape ``operation``, ``varied`` (the symbol) and its value under that symbol.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

#: Device memories for which the largest size is stated, in 10⁹ bytes.
MEMORIES = (24, 80)


class Law(NamedTuple):
    """y ≈ scale · x^exponent over the larger half of the sizes, at least three; ``residual`` is the RMS factor of misfit."""

    exponent: float
    scale: float
    residual: float
    points: int

    def at(self, x: float) -> float:
        return self.scale * x**self.exponent

    def reaches(self, y: float) -> float:
        """The x at which the law gives y; infinite where it does not grow."""
        return (y / self.scale) ** (1 / self.exponent) if self.exponent > 0.05 else math.inf


class Sweep(NamedTuple):
    """One operation over one symbol: sizes with median ms and peak MB (an unmeasured size has no peak)."""

    operation: str
    varied: str
    fixed: dict[str, Any]
    sizes: list[float]
    ms: list[float]
    peak_mb: list[float | None]

    def time_law(self) -> Law | None:
        return fit(self.sizes, self.ms)

    def memory_law(self) -> Law | None:
        known = [(x, y) for x, y in zip(self.sizes, self.peak_mb, strict=True) if y]
        return fit([x for x, _ in known], [y for _, y in known])


def fit(x: list[float], y: list[float]) -> Law | None:
    """A power law through the larger half of the points (three at least); None for fewer than three points.

    >>> law = fit([1, 2, 4, 8], [3, 12, 48, 192])
    >>> round(law.exponent, 6), round(law.scale, 6), round(law.residual, 6), law.points
    (2.0, 3.0, 1.0, 3)
    """
    if len(x) < 3:
        return None
    order = np.argsort(x)[-max(3, math.ceil(len(x) / 2)) :]
    log_x, log_y = np.log(np.asarray(x, float)[order]), np.log(np.asarray(y, float)[order])
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    misfit = np.sqrt(np.mean((log_y - exponent * log_x - intercept) ** 2))
    return Law(float(exponent), float(np.exp(intercept)), float(np.exp(misfit)), len(order))


def sweeps(rows: list[dict[str, Any]]) -> list[Sweep]:
    """The sweeps in ``rows``, sizes rising."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["suite"] == "scaling" and "p50_ms" in row and "ratio" not in row:
            groups.setdefault((row["shape"]["operation"], row["shape"]["varied"]), []).append(row)
    found = []
    for (operation, varied), group in groups.items():
        group.sort(key=lambda row: row["shape"][varied])
        shape = group[0]["shape"]
        fixed = {k: v for k, v in shape.items() if k not in ("operation", "varied", varied)}
        sizes = [float(row["shape"][varied]) for row in group]
        found.append(
            Sweep(operation, varied, fixed, sizes, [r["p50_ms"] for r in group], [r.get("peak_mb") for r in group])
        )
    return found
