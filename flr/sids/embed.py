"""Item embeddings: from texts, from training histories, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from flr.data import Catalogue, RecDataset
from flr.data.features import cooccurrence, reduced, text_tfidf
from flr.data.frames import TEXT
from flr.files import check_regular, naming, sha256

from .codebooks import check_embeddings

#: Attributes of a catalogue that say something of an item in words, in the order in which they are written.
TEXT_FIELDS = (
    "brand", "author", "artist", "developer", "publisher", "genre", "genres", "category", "categories", "description",
)  # fmt: skip
#: Sources whose space is made from the catalogue or the log at hand: another one has another space.
FITTED = ("tfidf", "cooccurrence")
_LONGEST = 20_000  # characters of an item's text
_WIDEST = 1 << 16  # numbers of an embedding in a file


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings and where they come from.

    Attributes:
        values: float32 [C, E], in catalogue order.
        source: "kind" ("tfidf", "cooccurrence", "lm", "sentence-transformers" or "file") and what tells this source
            from others of its kind; plain values, for JSON.
        empty: items of which the source knows nothing: no text, or no training row. Their embeddings are equal.
    """

    values: np.ndarray
    source: dict[str, Any]
    empty: int = 0


def item_texts(catalogue: Catalogue, fields: Sequence[str] | None = None) -> list[str]:
    """A text for every item: its title, then what the attributes say.

    Args:
        catalogue: the items.
        fields: names of text attributes; None for those of :data:`TEXT_FIELDS` that the catalogue has.

    Raises:
        ValueError: an attribute that the catalogue lacks, or that is not text; or no texts at all.

    Example:
        >>> items = Catalogue(["1"], ["Kind of Blue"], attributes={"artist": ["Miles Davis"], "year": [1959]})
        >>> item_texts(items)
        ['Kind of Blue. artist: Miles Davis']
    """
    if fields is None:
        fields = [name for name in TEXT_FIELDS if name in catalogue.attributes]
        fields = [name for name in fields if catalogue.attributes[name].dtype == TEXT]
    for name in fields:
        kind = catalogue.attributes[name].dtype if name in catalogue.attributes else None
        if kind is None or kind != TEXT:
            known = ", ".join(n for n, values in catalogue.attributes.items() if values.dtype == TEXT) or "none"
            got = f"{name!r}" + ("" if kind is None else f" of {kind}")
            raise ValueError(f"text_fields: expected text attributes of the catalogue ({known}), got {got}")
    if not fields and all(t in ("", i) for t, i in zip(catalogue.titles, catalogue.item_ids, strict=True)):
        raise ValueError("embed: expected items with titles or text attributes, got none (try cooccurrence)")
    texts = []
    for item, title in enumerate(catalogue.titles):
        told = [(name, str(catalogue.attributes[name][item]).strip()) for name in fields]
        parts = [title.strip(), *(f"{name}: {value}" for name, value in told if value)]
        texts.append(". ".join(part for part in parts if part)[:_LONGEST])
    return texts


def embed_items(
    dataset: RecDataset,
    source: str,
    *,
    size: int = 256,
    fields: Sequence[str] | None = None,
    revision: str | None = None,
    batch_size: int = 32,
    max_tokens: int = 256,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Embedded:
    """Embeddings of every item of a data set.

    Args:
        dataset: its catalogue, and for "cooccurrence" its training rows; valid and test rows are never looked at.
        source: "tfidf" (words of the texts, truncated SVD), "cooccurrence" (truncated SVD of what stands beside what in
            training histories), FILE.npy (float [C, E] in catalogue order), or a language model: a folder or an id on
            the Hub, a causal LM, whose last hidden states are averaged over the text, or one of sentence-transformers.
        size: E of "tfidf" and "cooccurrence".
        fields: as for :func:`item_texts`.
        revision, batch_size, max_tokens, device: of a language model; longer texts are cut.
        seed: of the SVD.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an unusable source, as its kind says. ModuleNotFoundError: sentence-transformers is not installed.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    catalogue = dataset.catalogue
    if len(catalogue) == 0:
        raise ValueError("catalogue: expected at least one item, got none")
    if source == "cooccurrence":
        return _together(dataset, size, seed)
    if source.endswith(".npy"):
        return Embedded(*_from_file(Path(source), len(catalogue)))
    texts = item_texts(catalogue, fields)
    empty = sum(not text for text in texts)
    if source == "tfidf":
        return Embedded(reduced(text_tfidf(texts), size, seed), {"kind": "tfidf", "size": size, "seed": seed}, empty)
    from .language import embed_texts  # transformers

    values, about = embed_texts(
        [text or "?" for text in texts], source, revision, batch_size, max_tokens, device, progress
    )
    return Embedded(check_embeddings(values), about | {"fields": None if fields is None else list(fields)}, empty)


def _together(dataset: RecDataset, size: int, seed: int) -> Embedded:
    """Truncated SVD of I + D^(-1/2) (M + Mᵀ) D^(-1/2), M the co-occurrence of the training rows, D its sums.

    I makes the matrix one of inner products (none of its eigenvalues is negative): items that stand together are near
    each other, and not only those that stand beside the same others. Items without a training row have zeros.
    """
    matrix = cooccurrence(dataset.train, len(dataset.catalogue), backward=1.0)
    degree = np.asarray(matrix.sum(1)).ravel()
    if not degree.any():
        raise ValueError("embed: expected training rows with histories for cooccurrence, got none")
    scale = sp.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1)))
    itself = sp.diags_array((degree > 0).astype(np.float64))
    values = reduced((itself + scale @ matrix @ scale).tocsr(), size, seed)
    return Embedded(values, {"kind": "cooccurrence", "size": size, "seed": seed}, int((degree == 0).sum()))


def _from_file(path: Path, items: int) -> tuple[np.ndarray, dict[str, Any]]:
    check_regular(path, "a .npy file")
    with naming(path, "an array of numbers in .npy form"):
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles, and reads nothing before the checks
        if array.ndim != 2 or len(array) != items or not 1 <= array.shape[1] <= _WIDEST:
            raise ValueError(
                f"embeddings: expected [{items}, 1 to {_WIDEST}], one row an item, got {list(array.shape)}"
            )
        values = check_embeddings(array)
    return values, {"kind": "file", "name": path.name, "width": values.shape[1], "sha256": sha256(path)}
