"""Embeddings to codebooks: residual k-means, or a residual-quantised autoencoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from flr.data.codes import MAX_LEVELS

from .codebooks import MAX_CODES, METHODS, Codebooks, check_embeddings
from .kmeans import Advance, balanced_prices, fit_residual, largest_load, nearest
from .rqvae import train_autoencoder

logger = logging.getLogger("flr")
_CELLS = 1 << 28  # of embeddings x codes at a time: more embeddings than fit are sampled


def fit_codes(
    embeddings: np.ndarray,
    *,
    method: str = "rq-kmeans",
    levels: int = 3,
    codes: int = 256,
    balance: float = 1.25,
    iterations: int = 16,
    epochs: int = 100,
    latent_size: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Codebooks:
    """Codebooks for embeddings; the codes are ``fit_codes(x).encode(x)``.

    Args:
        embeddings: float [C, E], finite; of equal ones the codes are equal.
        method: "rq-kmeans" (residual k-means) or "rq-vae" (a small autoencoder whose latents are written as residual
            codes, learned together).
        levels: L, codes of an ID, 1 to 26. codes: K of every level, 2 to 65,536, at most C.
        balance: most items of a code, in mean loads: at least 1; 0 for no bound. Many embeddings that are equal, or
            nearly so, can exceed it, which a warning says.
        iterations: of k-means at every level, at least 1.
        epochs, latent_size: of the autoencoder: passes over the embeddings, and D.
        seed: the same seed, embeddings and device give the same codebooks.
        device: where to compute, such as "cuda".
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument out of range, or embeddings that are not finite numbers.
    """
    x = check_embeddings(embeddings)
    sizes = {"iterations": iterations, "epochs": epochs, "latent_size": latent_size}
    check_sizes(len(x), method, levels, codes, balance, **sizes)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(x), generator=generator)[: max(codes, _CELLS // codes)].sort().values
    points = torch.from_numpy(x)[kept].to(device)
    mean = points.mean(0)
    centred = points - mean
    scale = float(centred.square().mean().sqrt()) or 1.0
    points = centred / scale
    if method == "rq-kmeans":
        with _bar(progress, "residual k-means", levels * iterations) as advance:
            books, prices = fit_residual(points, levels, codes, balance, iterations, generator, advance)
        made = Codebooks(method, books, prices, mean, scale)
    else:
        with _bar(progress, "RQ-VAE", epochs) as advance:
            encoder, decoder, latents, books = train_autoencoder(
                points, levels, codes, epochs, latent_size, generator, advance
            )
        made = Codebooks(method, books, _prices(latents, books, balance), mean, scale, encoder, decoder)
    _warn_if_crowded(made, x[kept], balance)
    return made


def _warn_if_crowded(made: Codebooks, x: np.ndarray, balance: float) -> None:
    """Say where a code holds more of the embeddings that it was made from than ``balance`` allows."""
    capacity = largest_load(len(x), made.codes, balance)
    fullest = [int(np.bincount(level).max()) for level in made.encode(x).T] if balance else []
    above = [f"{load} at level {level}" for level, load in enumerate(fullest, 1) if load > capacity]
    if above:
        wanted = f"balance {balance:g} allows {capacity} items of a code, and the fullest hold {', '.join(above)}"
        logger.warning(f"{wanted}: embeddings that are equal, or nearly so, stay together")


def check_sizes(items: int, method: str, levels: int, codes: int, balance: float, **counts: int) -> None:
    """ValueError for options of :func:`fit_codes` that are out of range."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels: expected 1 to {MAX_LEVELS}, got {levels}")
    if not 2 <= codes <= min(MAX_CODES, items):
        raise ValueError(f"codes: expected 2 to {min(MAX_CODES, items)} for {items} items, got {codes}")
    if balance and not 1 <= balance < float("inf"):
        raise ValueError(f"balance: expected 0 or at least 1, got {balance}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _prices(points: Tensor, books: Tensor, balance: float) -> Tensor:
    """Prices [L, K] for books that are made already."""
    prices = torch.zeros(books.shape[:2], device=books.device)
    if balance:
        for level, book in enumerate(books):
            prices[level] = balanced_prices(points, book, balance)
            points = points - book[nearest(points, book, prices[level])]
    return prices


@contextmanager
def _bar(enabled: bool, text: str, total: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
