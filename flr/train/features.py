"""Item embeddings from what is known about the items, for models that are trained from scratch.

A table of random vectors knows nothing of an item that occurs once, or never, in training; its title does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_union
from sklearn.preprocessing import normalize

from flr.data import Catalogue, RecProcessor

INITS = ("random", "title")


def item_features(catalogue: Catalogue, size: int, seed: int = 0) -> np.ndarray:
    """Title features of every item: TF-IDF of words and of character 3- to 5-grams, reduced by a truncated SVD.

    Returns:
        float32 [C, size]; rows of unit length (zero for an item whose title has no known feature), so that a dot product
        is a cosine similarity of titles. Fewer than ``size`` informative columns are filled up with zeros.

    Example:
        >>> catalogue = Catalogue(["a", "b", "c"], ["Blue Train", "Blue Train (live)", "Giant Steps"])
        >>> x = item_features(catalogue, 8)
        >>> x.shape, bool(x[0] @ x[1] > x[0] @ x[2])
        ((3, 8), True)
    """
    if size < 1:
        raise ValueError(f"size: expected a positive number, got {size}")
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2)
    titles = [title or "?" for title in catalogue.titles]
    try:
        tfidf = make_union(words, pieces).fit_transform(titles)
    except ValueError:  # no piece occurs twice: a handful of items
        tfidf = words.fit_transform(titles)
    rank = min(size, min(tfidf.shape) - 1)
    features = np.zeros((len(titles), size), np.float32)
    if rank >= 1:
        reduced = TruncatedSVD(rank, random_state=seed).fit_transform(tfidf)
        features[:, :rank] = normalize(reduced / np.sqrt(np.linalg.norm(reduced, axis=0) + 1e-12))
    return features


@torch.no_grad()
def init_item_embeddings(model: Any, processor: RecProcessor, seed: int = 0, scale: float | None = None) -> None:
    """Write title features into the rows of the items' tokens, input and output table alike.

    A token that several items carry (a semantic-ID code) gets the mean of theirs. The features are turned by a random
    rotation, so that no dimension is special, and scaled to the table's RMS (or to ``scale``).

    Raises:
        ValueError: the codec is "title", whose tokens are text and not items.
    """
    codec = processor.item_codec
    if codec.name == "title":
        raise ValueError('codec: expected "id" or "sid" to initialise item tokens, got "title"')
    table = model.get_input_embeddings().weight
    size = table.shape[1]
    features = torch.from_numpy(item_features(processor.catalogue, size, seed)).to(table)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    features = features @ rotation.to(table)
    tokens = torch.from_numpy(codec.tokens.astype(np.int64)).to(table.device)
    owner = torch.repeat_interleave(torch.arange(len(codec)), torch.from_numpy(np.diff(codec.offsets))).to(table.device)
    total = torch.zeros_like(table).index_add_(0, tokens, features[owner])
    count = torch.bincount(tokens, minlength=len(table)).to(table)
    rows = (count > 0) & (total.abs().sum(1) > 0)
    mean = total[rows] / count[rows, None]
    target = scale or float(table.square().mean().sqrt())
    mean = mean * (target / mean.square().mean().sqrt())
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight[rows] = mean.to(weight)
