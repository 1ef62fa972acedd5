"""K-means whose clusters hold about equally many points: every code has a price, which makes a crowded one dear.

    code of a point x = argmin over codes j of |x - c_j|² + price_j        (ties: the smallest j)

Prices are those of the transport problem in which no code holds more than its share. So the balanced assignment is a
function of the point alone: one that comes later is assigned by the same rule as those that were there from the start,
and equal points share a code, however many they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Advance = Callable[[], None]
_CELLS = 1 << 26  # of points x codes at a time
_STEPS = 30  # of soft assignments
_ROUNDS = 600  # of the auction
_INCREMENT = 0.01  # of the auction, in mean margins: more ends sooner and moves more points than need be


def costs(points: Tensor, centroids: Tensor, prices: Tensor) -> Tensor:
    """|c|² - 2 x·c + price, float32 [n, K]: the squared distance and the price, less what is the same for all codes."""
    return torch.addmm((centroids.square().sum(1) + prices)[None], points, centroids.T, alpha=-2)


def nearest(points: Tensor, centroids: Tensor, prices: Tensor) -> Tensor:
    """The code of every point, int64 [n]; points [n, D], centroids [K, D], prices [K]."""
    step = max(1, _CELLS // len(centroids))
    return torch.cat([costs(part, centroids, prices).argmin(1) for part in points.split(step)])


def largest_load(points: int, codes: int, balance: float) -> int:
    """How many of ``points`` a code may hold."""
    return math.ceil(balance * points / codes - 1e-6)  # 1.1 · 20 is a little above 22


def balanced_prices(
    points: Tensor, centroids: Tensor, balance: float, start: Tensor | None = None, last: bool = True
) -> Tensor:
    """Prices, float32 [K], that keep codes from holding more than ``balance`` times the mean load, rounded up.

    Ascent in the dual of the transport problem, over assignments that are soft first and then ever harder, and an
    auction for what is left. Where many points are equal no price helps, and where many are very
    near each other the auction may end before all of them are shared out: a code stays above.

    Args:
        points: float32 [n, D]. centroids: float32 [K, D], K at least 2.
        balance: at least 1.
        start: prices of centroids near these, or None.
        last: False where the centroids will move again, and a code may stay a little above.
    """
    size = len(centroids)
    prices = torch.zeros(size, device=points.device) if start is None else start.clone()
    capacity = largest_load(len(points), size, balance)
    base = costs(points, centroids, torch.zeros_like(prices))
    near = base.topk(2, largest=False).values
    margin = (near[:, 1] - near[:, 0]).mean().clamp(min=1e-12)
    drift, scale = torch.zeros_like(prices), torch.zeros_like(prices)  # as in Adam: codes differ in how steep they are
    steps = _STEPS if last else _STEPS // 2
    for step in range(steps):
        rest = 1 - step / steps
        load = ((base + prices) / (-margin * max(0.05, rest * rest))).softmax(1).sum(0)
        slope = (load / capacity - 1).clamp(max=3)
        drift, scale = 0.8 * drift + 0.2 * slope, 0.95 * scale + 0.05 * slope.square()
        prices = (prices + margin * (0.05 + rest) * drift / (scale.sqrt() + 0.02)).clamp(min=0)
    return _auction(base, prices, capacity, _ROUNDS if last else _ROUNDS // 20, _INCREMENT * margin)


def _auction(base: Tensor, prices: Tensor, capacity: int, rounds: int, increment: Tensor) -> Tensor:
    """Raise the prices of all codes above ``capacity`` until the surplus would leave, round by round."""
    code = (base + prices).argmin(1)
    for _ in range(rounds):
        load = torch.bincount(code, minlength=len(prices))
        crowded = load > capacity
        if not bool(crowded.any()):
            break
        members = crowded[code].nonzero()[:, 0]  # prices only rise here, so nobody else has a reason to move
        near = (offers := base[members]).add(prices).topk(2, largest=False).values
        margin = near[:, 1] - near[:, 0]
        order = margin.argsort(stable=True)
        order = order[code[members][order].argsort(stable=True)]  # code by code, each by margin
        margin = margin[order]
        # between the margins of the last that has to leave and of the first that may stay
        last = ((load * crowded).cumsum(0) - capacity - 1)[crowded]
        prices[crowded] += (margin[last] + margin[last + 1]) / 2 + increment
        code[members] = (offers + prices).argmin(1)
    return prices


def kmeans_start(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` points, [size, D], drawn by k-means++: far ones are likelier. Points repeat only where fewer differ."""
    chosen = int(torch.randint(len(points), (1,), generator=generator))
    centroids = [points[chosen]]
    squares = points.square().sum(1)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for _ in range(size - 1):
        last = centroids[-1]
        distance = torch.minimum(distance, (squares - 2 * (points @ last) + last @ last).clamp(min=0))
        distance[chosen] = 0
        weights = distance.cumsum(0, dtype=torch.float64)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(weights.device) * weights[-1]
        chosen = min(int(torch.searchsorted(weights, draw, right=True)), len(points) - 1)
        centroids.append(points[chosen])
    return torch.stack(centroids)


def fit_centroids(
    points: Tensor, size: int, balance: float, iterations: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """(centroids [size, D], prices [size]) after every iteration: Lloyd's from k-means++, the second half with prices.

    ``balance`` 0: no prices at all.
    """
    centroids = kmeans_start(points, size, generator)
    prices, half = torch.zeros(size, device=points.device), iterations // 2
    for iteration in range(iterations):
        code = nearest(points, centroids, prices)
        centroids = revived(points, code, means(points, code, centroids))
        last = iteration == iterations - 1
        if balance and (last or iteration >= half):
            prices = balanced_prices(points, centroids, balance, prices, last)
        yield centroids, prices


def fit_residual(
    points: Tensor,
    levels: int,
    codes: int,
    balance: float,
    iterations: int,
    generator: torch.Generator,
    advance: Advance | None = None,
) -> tuple[Tensor, Tensor]:
    """Books [L, K, D] and prices [L, K]: every level on what the ones before leave; ``advance`` after an iteration."""
    books, prices = [], []
    for _ in range(levels):
        for step in fit_centroids(points, codes, balance, iterations, generator):
            centroids, price = step
            if advance is not None:
                advance()
        books.append(centroids)
        prices.append(price)
        points = points - centroids[nearest(points, centroids, price)]
    return torch.stack(books), torch.stack(prices)


def means(points: Tensor, code: Tensor, centroids: Tensor) -> Tensor:
    """The mean of every code's points, [K, D], added in a fixed order; a code without points keeps its centroid."""
    order = code.argsort(stable=True)
    load = torch.bincount(code, minlength=len(centroids))
    total = torch.segment_reduce(points[order], "sum", lengths=load, unsafe=True)
    return torch.where((load > 0)[:, None], total / load.clamp(min=1)[:, None], centroids)


def revived(points: Tensor, code: Tensor, centroids: Tensor) -> Tensor:
    """Codes without points take the place of the points that are farthest from their own, one each."""
    dead = (torch.bincount(code, minlength=len(centroids)) == 0).nonzero()[:, 0]
    if not len(dead):
        return centroids
    error = (points - centroids[code]).square().sum(1)
    far = error.argsort(descending=True, stable=True)[: len(dead)]
    far = far[error[far] > 0]  # where every point has its own code, a spare one stays where it is
    moved = centroids.clone()
    moved[dead[: len(far)]] = points[far]
    return moved
