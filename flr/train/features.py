"""Item embeddings from what is known about the items, for models that are trained from scratch.

A table of random vectors knows nothing of an item that occurs once, or never, in training; its title does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from flr.data import Catalogue, RecProcessor


def title_tfidf(catalogue: Catalogue) -> sp.csr_matrix:
    """TF-IDF of the titles' words and of their character 3- to 5-grams, rows of unit length: float64 [C, features]."""
    titles = [title or "?" for title in catalogue.titles]
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", stop_words="english")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2)
    blocks = [_fit(vectoriser, titles) for vectoriser in (words, pieces)]
    return normalize(sp.hstack(blocks, format="csr"))


def _fit(vectoriser: TfidfVectorizer, titles: list[str]) -> sp.csr_matrix:
    try:
        return vectoriser.fit_transform(titles)
    except ValueError:  # nothing but stop words, or no piece that occurs twice
        return sp.csr_matrix((len(titles), 1))


def item_features(catalogue: Catalogue, size: int, seed: int = 0, power: float = 0.5) -> np.ndarray:
    """Title features of every item: :func:`title_tfidf` reduced by a truncated SVD.

    Args:
        size: columns. seed: of the SVD.
        power: directions are scaled by their singular value to this power, >= 0. 1 is the plain SVD, in which words
            that many titles share (a genre) come first; less lets rare words (a name) count.

    Returns:
        float32 [C, size]; rows of unit length (zero for an item whose title has no known feature). Fewer than ``size``
        informative columns are filled up with zeros.

    Example:
        >>> catalogue = Catalogue(["a", "b", "c"], ["Blue Train", "Blue Train (live)", "Giant Steps"])
        >>> x = item_features(catalogue, 8)
        >>> x.shape, bool(x[0] @ x[1] > x[0] @ x[2])
        ((3, 8), True)
    """
    if size < 1:
        raise ValueError(f"size: expected a positive number, got {size}")
    tfidf = title_tfidf(catalogue)
    rank = min(size, min(tfidf.shape) - 1)
    features = np.zeros((len(catalogue), size), np.float32)
    if rank >= 1:
        svd = TruncatedSVD(rank, random_state=seed)
        reduced = svd.fit_transform(tfidf)
        features[:, :rank] = normalize(reduced * np.maximum(svd.singular_values_, 1e-12) ** (power - 1))
    return features


@torch.no_grad()
def init_item_embeddings(
    model: Any, processor: RecProcessor, seed: int = 0, scale: float | None = None, power: float = 0.5
) -> None:
    """Write title features into the rows of the items' tokens, input and output table alike.

    A token that several items carry (a semantic-ID code) gets the mean of theirs. The features are turned by a random
    rotation, so that no dimension is special, and scaled to the table's RMS (or to ``scale``). ``power``: as for
    :func:`item_features`.

    Raises:
        ValueError: the codec is "title", whose tokens are text and not items.
    """
    codec = processor.item_codec
    if codec.name == "title":
        raise ValueError('codec: expected "id" or "sid" to initialise item tokens, got "title"')
    table = model.get_input_embeddings().weight
    size = table.shape[1]
    features = torch.from_numpy(item_features(processor.catalogue, size, seed, power)).to(table)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    features = features @ rotation.to(table)
    tokens = torch.from_numpy(codec.tokens.astype(np.int64)).to(table.device)
    owner = torch.repeat_interleave(torch.arange(len(codec)), torch.from_numpy(np.diff(codec.offsets))).to(table.device)
    total = torch.zeros_like(table).index_add_(0, tokens, features[owner])
    count = torch.bincount(tokens, minlength=len(table)).to(table)
    rows = (count > 0) & (total.abs().sum(1) > 0)
    mean = total[rows] / count[rows, None]
    if codec.name == "sid":  # what the codes share says nothing about any of them
        mean = torch.nn.functional.normalize(mean - mean.mean(0))
    target = scale or float(table.square().mean().sqrt())
    mean = mean * (target / mean.square().mean().sqrt())
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight[rows] = mean.to(weight)
