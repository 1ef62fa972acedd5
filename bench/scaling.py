"""Growth laws from the rows of suite ``scaling``: exponents by least squares on logarithms, and what fits a memory.

Memory is a sum of buffers, so for extrapolation it is fitted as a + b·x + c·x², all ≥ 0, by non-negative least squares
on relative errors; a power law would carry the constant part along. The fit without the largest size, asked for that
size, shows how far it can be trusted.

A row of that suite carries in its shape ``operation``, ``varied`` (the symbol) and its value under that symbol.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

#: Device memories for which the largest size is stated, in 10⁹ bytes.
MEMORIES = (24, 80)


class Law(NamedTuple):
    """y ≈ scale · x^exponent over the larger half of the sizes, at least three.

    ``residual`` is the RMS factor of misfit.
    """

    exponent: float
    scale: float
    residual: float
    points: int

    def at(self, x: float) -> float:
        return self.scale * x**self.exponent


class Buffers(NamedTuple):
    """y ≈ a + b·x + c·x²; ``trusted`` is measured / predicted at the largest size by the fit without it."""

    a: float
    b: float
    c: float
    trusted: float | None

    def at(self, x: float) -> float:
        return self.a + self.b * x + self.c * x * x

    def reaches(self, y: float) -> float:
        """The x at which the law gives y; infinite where it does not grow, 0 where it begins above.

        The root is written without a difference: a c that is nothing but rounding must not move it.

        >>> round(Buffers(0.0, 1.6, 3e-19, None).reaches(16.0), 9)
        10.0
        """
        if self.a >= y:
            return 0.0
        slope = self.b + math.sqrt(self.b**2 + 4 * self.c * (y - self.a))
        return 2 * (y - self.a) / slope if slope > 0 else math.inf

    def largest(self, y: float, measured: float) -> float | None:
        """:meth:`reaches`, unless the law failed at the largest measured size or that is under a thousandth of it."""
        x = self.reaches(y)
        credible = self.trusted is not None and 0.8 <= self.trusted <= 1.25
        return x if credible and 0 < x <= 1000 * measured else None


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
        return fit(*self._memory())

    def buffers(self) -> Buffers | None:
        return fit_buffers(*self._memory())

    def _memory(self) -> tuple[list[float], list[float]]:
        known = [(x, y) for x, y in zip(self.sizes, self.peak_mb, strict=True) if y]
        return [x for x, _ in known], [y for _, y in known]


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


def fit_buffers(x: list[float], y: list[float]) -> Buffers | None:
    """The non-negative a + b·x + c·x² through the points; None for fewer than three.

    >>> law = fit_buffers([1, 2, 4, 8], [13, 16, 22, 34])
    >>> round(law.a, 6), round(law.b, 6), round(law.c, 6), round(law.trusted, 6), round(law.reaches(310))
    (10.0, 3.0, 0.0, 1.0, 100)
    """
    if len(x) < 3:
        return None
    size, value = np.asarray(x, float), np.asarray(y, float)

    def solve(count: int) -> np.ndarray:
        largest = size[:count].max()
        columns = np.stack([np.ones(count), size[:count] / largest, (size[:count] / largest) ** 2], axis=1)
        parts = nnls(columns / value[:count, None], np.ones(count))[0]  # of y at the largest size
        parts[parts < 1e-9 * parts.max()] = 0  # rounding, which differs between processors
        return parts / [1, largest, largest**2]

    law = Buffers(*(float(v) for v in solve(len(x))), None)
    if len(x) < 4:
        return law
    rest = Buffers(*(float(v) for v in solve(len(x) - 1)), None)
    return law._replace(trusted=float(value[-1] / rest.at(size[-1])))


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
