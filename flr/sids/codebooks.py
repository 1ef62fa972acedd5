"""Codebooks: what turns an item's embedding into its codes, made once and stored, and what is said about codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flr.data.codes import MAX_LEVELS, names_of
from flr.files import PathLike, atomic_file, check_regular

from .kmeans import nearest

METHODS = ("rq-kmeans", "rq-vae")
MAX_CODES = 1 << 16
_ROWS = 1 << 15  # embeddings at a time
_MOST_BYTES = 1 << 32  # of a file of codebooks

#: Linear layers, each (weight [out, in], bias [out]), with ReLU between them; none at all is the identity.
Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Residual codebooks: a vector is written as a sum of one centroid from each level's book.

        z = encoder((x - mean) / scale)
        code_l = argmin over j of |r_l - book_l[j]|² + price_l[j],   r_1 = z,   r_(l+1) = r_l - book_l[code_l]

    Attributes:
        method: "rq-kmeans", whose encoder and decoder are the identity, or "rq-vae".
        books: float32 [L, K, D], centroids of L levels.
        prices: float32 [L, K], >= 0: what keeps codes from being crowded (:mod:`flr.sids.kmeans`).
        mean: float32 [E], of the embeddings. scale: their root mean square about it.
        encoder, decoder: layers from E to D and back.

    Example:
        >>> from flr.sids import fit_codes
        >>> x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
        >>> books = fit_codes(x, levels=2, codes=8, progress=False)
        >>> codes = books.encode(x)
        >>> codes.shape, codes.dtype, bool(books.relative_errors(x, codes)[1] < books.relative_errors(x, codes)[0])
        ((200, 2), dtype('int64'), True)
    """

    method: str
    books: Tensor
    prices: Tensor
    mean: Tensor
    scale: float
    encoder: Layers = ()
    decoder: Layers = ()

    def __post_init__(self) -> None:
        levels, codes, size = self.books.shape
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not (1 <= levels <= MAX_LEVELS and 2 <= codes <= MAX_CODES):
            expected = f"1 to {MAX_LEVELS} levels of 2 to {MAX_CODES} codes"
            raise ValueError(f"books: expected {expected}, got {levels} of {codes}")
        if tuple(self.prices.shape) != (levels, codes):
            raise ValueError(f"prices: expected [{levels}, {codes}], got {list(self.prices.shape)}")
        for name, layers, ends in (
            ("encoder", self.encoder, (self.width, size)),
            ("decoder", self.decoder, (size, self.width)),
        ):
            _check_layers(name, layers, *ends)
        tensors = [self.books, self.prices, self.mean, *(t for pair in self.encoder + self.decoder for t in pair)]
        if not all(bool(t.isfinite().all()) for t in tensors) or not 0 < self.scale < math.inf:
            raise ValueError("books: expected finite numbers, got others")

    @property
    def levels(self) -> int:
        """L, codes of an ID."""
        return self.books.shape[0]

    @property
    def codes(self) -> int:
        """K, codes of a level."""
        return self.books.shape[1]

    @property
    def width(self) -> int:
        """E, numbers of an embedding."""
        return len(self.mean)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """The codes of every embedding.

        Args:
            embeddings: float [C, E], finite.

        Returns:
            int64 [C, L], in 0..K-1.

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        checked = check_embeddings(embeddings, self.width)
        parts = [self._encoded(checked[start : start + _ROWS]) for start in range(0, len(checked), _ROWS)]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, self.levels), np.int64)

    def _encoded(self, embeddings: np.ndarray) -> Tensor:
        rest = run_layers(self.encoder, self._scaled(embeddings))
        found = []
        for book, price in zip(self.books, self.prices, strict=True):
            found.append(nearest(rest, book, price))
            rest = rest - book[found[-1]]
        return torch.stack(found, 1)

    def _scaled(self, embeddings: np.ndarray) -> Tensor:
        return (torch.from_numpy(embeddings).to(self.mean) - self.mean) / self.scale

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """The embeddings that codes int64 [C, l] stand for, float32 [C, E]; l may be less than L: the first levels."""
        indices = torch.from_numpy(np.asarray(codes, np.int64)).to(self.mean.device)
        total = sum(book[column] for book, column in zip(self.books, indices.T, strict=False))
        return (run_layers(self.decoder, total) * self.scale + self.mean).cpu().numpy()

    def relative_errors(self, embeddings: np.ndarray, codes: np.ndarray) -> list[float]:
        """|x - reconstruction|² / |x - mean|², summed over all rows, after each of the levels."""
        x = check_embeddings(embeddings, self.width)
        whole = float(np.square(x - self.mean.cpu().numpy(), dtype=np.float64).sum()) or 1.0
        errors = []
        for level in range(1, self.levels + 1):
            parts = [slice(start, start + _ROWS) for start in range(0, len(x), _ROWS)]
            squares = (np.square(x[p] - self.reconstruct(codes[p, :level]), dtype=np.float64).sum() for p in parts)
            errors.append(float(sum(squares)) / whole)
        return errors

    def save(self, path: PathLike) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.torch import save_file

        tensors = {"books": self.books, "prices": self.prices, "mean": self.mean}
        tensors["scale"] = torch.tensor([self.scale], dtype=torch.float64)
        for name, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for number, (weight, bias) in enumerate(layers):
                tensors |= {f"{name}.{number}.weight": weight, f"{name}.{number}.bias": bias}
        with atomic_file(path) as temporary:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(kept, temporary, metadata={"method": self.method, "kind": "flr-codebooks"})

    @classmethod
    def load(cls, path: PathLike) -> Codebooks:
        """Read what :meth:`save` wrote; ValueError naming the file where it is anything else."""
        from safetensors import SafetensorError, safe_open

        check_regular(path, "a safetensors file of codebooks")
        if (size := Path(path).stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{path}: expected at most {_MOST_BYTES} bytes, got {size}")
        try:
            with safe_open(path, framework="pt") as file:
                method = (file.metadata() or {}).get("method", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
        try:
            return cls._of(method, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, method: str, tensors: Mapping[str, Tensor]) -> Codebooks:
        for name, dimensions in (("books", 3), ("prices", 2), ("mean", 1), ("scale", 1)):
            if name not in tensors or tensors[name].ndim != dimensions:
                got = list(tensors[name].shape) if name in tensors else "none"
                raise ValueError(f"{name}: expected a tensor of {dimensions} dimensions, got {got}")
        if len(tensors["scale"]) != 1:
            raise ValueError(f"scale: expected one number, got {len(tensors['scale'])}")
        layers: dict[str, Layers] = {}
        for part in ("encoder", "decoder"):
            count = sum(name.startswith(f"{part}.") for name in tensors) // 2
            names = [(f"{part}.{n}.weight", f"{part}.{n}.bias") for n in range(count)]
            if not all(name in tensors for pair in names for name in pair):
                raise ValueError(f"{part}: expected weights and biases of layers 0 to {count - 1}, got others")
            layers[part] = tuple((tensors[weight].float(), tensors[bias].float()) for weight, bias in names)
        books, prices, mean = (tensors[name].float() for name in ("books", "prices", "mean"))
        return cls(method, books, prices, mean, float(tensors["scale"][0]), **layers)


def run_layers(layers: Layers, x: Tensor) -> Tensor:
    """``layers`` of ``x`` [n, in], with ReLU between them."""
    for number, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(x.relu() if number else x, weight, bias)
    return x


def _check_layers(name: str, layers: Layers, first: int, last: int) -> None:
    width = first
    for weight, bias in layers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != width:
            raise ValueError(f"{name}: expected layers from {first} to {last}, got {list(weight.shape)} after {width}")
        width = weight.shape[0]
    if width != last:
        raise ValueError(f"{name}: expected layers from {first} to {last}, got {width} at the end")


def check_embeddings(embeddings: Any, width: int | None = None) -> np.ndarray:
    """``embeddings`` as contiguous float32 [C, E]; ValueError for another shape, dtype, or what is not finite."""
    array = np.asarray(embeddings)
    if array.ndim != 2 or not array.shape[1] or (width is not None and array.shape[1] != width):
        raise ValueError(f"embeddings: expected [C, {'E' if width is None else width}], got {list(array.shape)}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"embeddings: expected numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.require(array, np.float32, ["C", "W"])  # a file that is mapped cannot be written to: torch warns
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise ValueError(f"embeddings: expected finite numbers, got others in {len(bad)} rows, the first {bad[0]}")
    return array


def code_names(codes: np.ndarray) -> list[tuple[str, ...]]:
    """Codes int [C, L] by the names that the field uses, the level's letter and the number; at most 26 levels.

    >>> code_names(np.array([[7, 3]]))
    [('<a_7>', '<b_3>')]
    """
    array = np.asarray(codes)
    if array.ndim != 2 or array.shape[1] > MAX_LEVELS:
        raise ValueError(f"codes: expected [C, L] of at most {MAX_LEVELS} levels, got {list(array.shape)}")
    return names_of(array)


def code_report(sids: Sequence[tuple[str, ...]], codes: int | None = None) -> dict[str, Any]:
    """How well IDs tell items apart, and how evenly each level uses its codes.

    Args:
        sids: one an item, at least one.
        codes: K, for the share that is used; None: unknown.

    Returns:
        ``items``, ``distinct`` IDs, ``share_sharing`` (of items that have an ID in common with another),
        ``largest_group`` (items of one ID), ``levels``: for each ``used`` (codes), ``used_share`` (of K),
        ``perplexity`` (exponential of the entropy), ``largest_load`` (the fullest code, in mean loads).

    >>> report = code_report([("<a_0>", "<b_1>"), ("<a_0>", "<b_1>"), ("<a_1>", "<b_0>")], codes=2)
    >>> report["distinct"], report["largest_group"], round(report["levels"][0]["perplexity"], 2)
    (2, 2, 1.89)
    """
    groups = Counter(sids)
    shared = sum(size for size in groups.values() if size > 1)
    levels = []
    for level in range(max(len(sid) for sid in sids)):
        load = np.array(list(Counter(sid[level] for sid in sids if len(sid) > level).values()), np.float64)
        share = load / load.sum()
        entry = {"used": len(load), "perplexity": float(np.exp(-(share * np.log(share)).sum()))}
        entry |= {"used_share": len(load) / codes} if codes else {}
        levels.append(entry | {"largest_load": float(share.max() * (codes or len(load)))})
    counts = {"items": len(sids), "distinct": len(groups), "share_sharing": shared / len(sids)}
    return {**counts, "largest_group": max(groups.values()), "levels": levels}
