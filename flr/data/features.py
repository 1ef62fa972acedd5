"""What is known about items as numbers: the words of their texts, and who stands beside whom in training histories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from .catalogue import Catalogue
from .csr import distinct, numbered
from .interactions import Interactions
from .pairs import item_pairs


def text_tfidf(texts: Sequence[str]) -> sp.csr_matrix:
    """TF-IDF of the texts' words and of their character 3- to 5-grams, rows of unit length: float64 [C, features]."""
    known = [text or "?" for text in texts]
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", stop_words="english")
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=2)
    blocks = [_fit(vectoriser, known) for vectoriser in (words, pieces)]
    return normalize(sp.hstack(blocks, format="csr"))


def _fit(vectoriser: TfidfVectorizer, texts: list[str]) -> sp.csr_matrix:
    try:
        return vectoriser.fit_transform(texts)
    except ValueError:  # nothing but stop words, or no piece that occurs twice
        return sp.csr_matrix((len(texts), 1))


def item_features(catalogue: Catalogue, size: int, seed: int = 0, power: float = 0.5) -> np.ndarray:
    """Title features of every item: :func:`text_tfidf` of the titles, reduced by :func:`reduced`.

    Args:
        catalogue: the items.
        size, seed, power: as for :func:`reduced`.

    Returns:
        float32 [C, size]; rows of unit length (zero for an item whose title has no known feature).

    Example:
        >>> catalogue = Catalogue(["a", "b", "c"], ["Blue Train", "Blue Train (live)", "Giant Steps"])
        >>> x = item_features(catalogue, 8)
        >>> x.shape, bool(x[0] @ x[1] > x[0] @ x[2])
        ((3, 8), True)
    """
    return reduced(text_tfidf(catalogue.titles), size, seed, power)


def reduced(matrix: sp.csr_matrix, size: int, seed: int = 0, power: float = 0.5) -> np.ndarray:
    """The rows of a sparse matrix in a truncated SVD.

    Args:
        matrix: [C, features]. size: columns of the result. seed: of the SVD.
        power: directions are scaled by their singular value to this power, >= 0. 1 is the plain SVD, in which what
            many rows share (a genre) comes first; less lets what is rare (a name) count.

    Returns:
        float32 [C, size]; rows of unit length, zero where the matrix's row is. Fewer than ``size`` informative columns
        are filled up with zeros.
    """
    if size < 1:
        raise ValueError(f"size: expected a positive number, got {size}")
    rank = min(size, min(matrix.shape) - 1)
    features = np.zeros((matrix.shape[0], size), np.float32)
    if rank >= 1 and matrix.nnz:
        svd = TruncatedSVD(rank, random_state=seed)
        with np.errstate(invalid="ignore"):  # shares of the variance, which may be none
            projected = svd.fit_transform(matrix)
        features[:, :rank] = normalize(projected * np.maximum(svd.singular_values_, 1e-12) ** (power - 1))
    return features


def cooccurrence(train: Interactions, num_items: int, decay: float = 0.8, backward: float = 0.5) -> sp.csr_matrix:
    """M [C, C] = Σ decay^(gap - 1) for j after i, ``backward`` times that for j before i; gap is 1 for neighbours.

    Every pair of items of a user counts once, at its smallest gap, though rows are overlapping windows of one sequence.
    """
    if train.max_index >= num_items:
        raise ValueError(f"num_items: expected above the largest item index {train.max_index}, got {num_items}")
    user = numbered(train.users)
    users = int(user.max(initial=-1)) + 1
    if users * num_items * num_items >= 1 << 63:
        raise ValueError(f"train: expected users x items² below 2^63, got {users} users, {num_items} items")
    keys, gaps = [np.zeros(0, np.int64)], []
    for pairs in item_pairs(train):
        keys.append(distinct((user[pairs.row] * num_items + pairs.earlier) * num_items + pairs.later))
        gaps.append(np.full(len(keys[-1]), pairs.gap))
    found, place = np.unique(np.concatenate(keys), return_index=True)  # the first place is that of the smallest gap
    weights = decay ** (np.concatenate([np.zeros(0), *gaps])[place] - 1.0)
    i, j = found // num_items % num_items, found % num_items
    forward = sp.csr_matrix((weights, (i, j)), shape=(num_items, num_items))
    return (forward + backward * forward.T).tocsr()
