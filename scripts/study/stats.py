"""Means and differences of models that were trained several times, with intervals over users and seeds.

Two things are a matter of chance, which users are tested and which seeds a model was trained with; a resampling draws
both anew, users with all their rows, and the seeds of each model for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLES = 2000
_BLOCK = 250  # resamplings at a time


class Resampled:
    """Means of models over resampled users and seeds, by the same draws of users for all of them.

    Args:
        users: of the rows, [n]; rows of one user are drawn together.
        samples, seed: how many resamplings, and of the draws.

    Example:
        >>> drawn = Resampled(np.arange(50), samples=200)
        >>> drawn.interval(np.ones((3, 50)))
        (1.0, 1.0, 1.0)
        >>> drawn.difference(np.zeros((2, 50)), np.ones((3, 50)))
        (1.0, 1.0, 1.0)
    """

    def __init__(self, users: Sequence[str] | np.ndarray, samples: int = SAMPLES, seed: int = 0) -> None:
        _, self.cluster = np.unique(np.asarray(users), return_inverse=True)
        self.size, self.samples, self.seed = int(self.cluster.max()) + 1, samples, seed
        generator = np.random.default_rng(seed)
        #: How often each user is drawn, uint8 [samples, users] in blocks.
        self.counts = [self._drawn(generator, min(_BLOCK, samples - s)) for s in range(0, samples, _BLOCK)]

    def _drawn(self, generator: np.random.Generator, count: int) -> np.ndarray:
        drawn = generator.integers(0, self.size, (count, self.size)) + np.arange(count)[:, None] * self.size
        counts = np.bincount(drawn.ravel(), minlength=count * self.size).reshape(count, self.size)
        return counts.clip(max=255).astype(np.uint8)

    def means(self, values: np.ndarray, stream: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Means [samples] of values [seeds, n], of ``rows`` alone where given; a ``stream`` has its draws of seeds."""
        rows = np.arange(len(self.cluster)) if rows is None else rows
        cluster = self.cluster[rows]
        sizes = np.bincount(cluster, minlength=self.size).astype(np.float64)
        sums = np.stack([np.bincount(cluster, one[rows], self.size) for one in np.asarray(values, np.float64)], 1)
        seeds, share = np.random.default_rng((self.seed, stream)), np.full(sums.shape[1], 1 / sums.shape[1])
        found = []
        for block in self.counts:
            counts = block.astype(np.float32)
            each = (counts @ sums.astype(np.float32)) / (counts @ sizes.astype(np.float32))[:, None]  # [count, seeds]
            weights = seeds.multinomial(sums.shape[1], share, len(block))
            found.append((each * weights).sum(1) / sums.shape[1])
        return np.concatenate(found)

    def interval(self, values: np.ndarray, rows: np.ndarray | None = None) -> tuple[float, float, float]:
        """Mean of values [seeds, n], and a 95 % interval."""
        own = np.asarray(values) if rows is None else np.asarray(values)[:, rows]
        return (float(own.mean()), *_ends(self.means(values, 1, rows)))

    def difference(
        self, base: np.ndarray, other: np.ndarray, rows: np.ndarray | None = None
    ) -> tuple[float, float, float]:
        """Mean of ``other`` [seeds, n] less that of ``base`` [seeds', n], and a 95 % interval."""
        chosen = slice(None) if rows is None else rows
        mean = float(other[:, chosen].mean() - base[:, chosen].mean())
        return (mean, *_ends(self.means(other, 1, rows) - self.means(base, 2, rows)))


def _ends(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
