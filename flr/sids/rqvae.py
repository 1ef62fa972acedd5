"""RQ-VAE: an autoencoder whose latents are written as a sum of codes, learned together.

    loss = |x - decoder(q)|² + Σ over levels of (|sg(r_l) - c_l|² + β |r_l - sg(c_l)|²) / D,   q = Σ c_l

r_l is what the levels before leave, c_l the nearest centroid of the level, sg stops gradients, and q passes gradients
to the latent as if it were the latent itself. Centroids begin as residual k-means of the latents of an autoencoder that
was trained a little without codes. After an epoch, a centroid that no item chose takes the place of an item's residual.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .codebooks import Layers, run_layers
from .kmeans import Advance, fit_residual, nearest

_HIDDEN = (512, 256)  # sizes of the layers between embedding and latent
_COMMITMENT = 0.25  # β
_RATE, _BATCH, _STEPS = 1e-3, 1024, 8  # items a step, fewer where an epoch would have fewer steps
_WARM, _SETTLED = 0.1, 0.8  # shares of the epochs: before the first without codes, after the second none is revived
_ITERATIONS = 8  # of the k-means in which centroids begin


def train_autoencoder(
    points: Tensor,
    levels: int,
    codes: int,
    epochs: int,
    size: int,
    generator: torch.Generator,
    advance: Advance,
) -> tuple[Layers, Layers, Tensor, Tensor]:
    """Encoder, decoder, latents [n, D] and books [L, K, D] for points float32 [n, E] of about unit scale."""
    width = points.shape[1]
    sizes = [width, *(hidden for hidden in _HIDDEN if hidden > size), size]
    encoder, decoder = _layers(sizes, generator, points), _layers(sizes[::-1], generator, points)
    weights = [tensor for pair in (*encoder, *decoder) for tensor in pair]
    books: nn.Parameter | None = None
    optimizer = torch.optim.Adam(weights, _RATE)
    size_of_batch = max(1, min(_BATCH, len(points) // _STEPS))
    warm = max(1, int(_WARM * epochs))
    for epoch in range(epochs):
        if epoch == warm or (books is None and epoch == epochs - 1):
            books = _start(encoder, points, levels, codes, generator)
            optimizer.add_param_group({"params": [books]})
        for batch in torch.randperm(len(points), generator=generator).split(size_of_batch):
            part = points[batch.to(points.device)]
            latent = run_layers(encoder, part)
            loss = torch.zeros((), device=points.device)
            if books is not None:
                quantised, loss = _quantised(latent, books)
                latent = latent + (quantised - latent).detach()
            loss = loss + nn.functional.mse_loss(run_layers(decoder, latent), part)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if books is not None and epoch < _SETTLED * epochs:
            with torch.no_grad():
                revive(books.data, run_layers(encoder, points), generator)
        advance()
    if books is None:  # one epoch
        books = _start(encoder, points, levels, codes, generator)
    with torch.no_grad():
        return _frozen(encoder), _frozen(decoder), run_layers(encoder, points), books.detach()


@torch.no_grad()
def _start(encoder: Layers, points: Tensor, levels: int, codes: int, generator: torch.Generator) -> nn.Parameter:
    """Books that begin as residual k-means of the latents."""
    return nn.Parameter(fit_residual(run_layers(encoder, points), levels, codes, 0, _ITERATIONS, generator)[0])


@torch.no_grad()
def revive(books: Tensor, latents: Tensor, generator: torch.Generator) -> int:
    """Give centroids that nobody chose the place of residuals drawn at random, in place; how many there were."""
    count, rest = 0, latents
    free = torch.zeros(books.shape[1], device=books.device)
    for book in books:
        chosen = nearest(rest, book, free)
        dead = (torch.bincount(chosen, minlength=len(book)) == 0).nonzero()[:, 0]
        if len(dead):
            drawn = torch.randint(len(rest), (len(dead),), generator=generator).to(rest.device)
            book[dead] = rest[drawn]
            chosen = nearest(rest, book, free)
        count += len(dead)
        rest = rest - book[chosen]
    return count


def _quantised(latent: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the nearest centroids, [n, D], and the loss of centroids and commitment."""
    rest, total = latent, torch.zeros_like(latent)
    loss = torch.zeros((), device=latent.device)
    free = torch.zeros(books.shape[1], device=latent.device)
    for book in books:
        centroid = book[nearest(rest.detach(), book.detach(), free)]
        loss = loss + nn.functional.mse_loss(centroid, rest.detach())
        loss = loss + _COMMITMENT * nn.functional.mse_loss(rest, centroid.detach())
        total, rest = total + centroid, rest - centroid.detach()
    return total, loss


def _layers(sizes: list[int], generator: torch.Generator, like: Tensor) -> Layers:
    """Layers with He's initial weights, drawn from the generator and not from torch's own."""
    layers = []
    for first, last in pairwise(sizes):
        weight = torch.randn(last, first, generator=generator) * (2 / first) ** 0.5
        bias = torch.zeros(last, device=like.device, requires_grad=True)
        layers.append((weight.to(like).requires_grad_(), bias))
    return tuple(layers)


def _frozen(layers: Layers) -> Layers:
    return tuple((weight.detach(), bias.detach()) for weight, bias in layers)
