"""Semantic IDs in a prepared folder: made, read from others, and continued for new items.

A folder has its IDs in the catalogue (items.parquet) and, beside it, in ``sids/``:

    sids.json                where the embeddings came from, sizes, seed, digests, and how good the codes are
    sid.index.json           item id -> code tokens, the community's form
    codebooks.safetensors    what encodes new items; not there for codes that were read from a file

All of it appears at once: the folder is replaced whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flr.data import Catalogue, RecDataset
from flr.data.codes import read_codes
from flr.data.prepared_folder import ABOUT, BOOKS, INDEX, ITEMS, META, SIDS
from flr.files import PathLike, atomic_folder, read_json, sha256, temporary_folder, write_json

from .codebooks import Codebooks, code_names, code_report
from .embed import FITTED, Embedded, embed_items
from .quantize import check_sizes, fit_codes

_FORMAT, _VERSION = "flr-sids", 1
_AGREEMENT = 0.99  # of known items: the rest is rounding of a language model on another machine or in other batches


def make_codes(
    folder: PathLike,
    source: str,
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
    overwrite: bool = False,
    progress: bool = True,
    **embedding: Any,
) -> dict[str, Any]:
    """Embed the items of a prepared folder, make codebooks, and write IDs and codebooks into the folder.

    Args:
        folder: what ``flr prepare`` wrote.
        source: as for :func:`~flr.sids.embed_items`; ``embedding`` are its other options.
        method, levels, codes, balance, iterations, epochs, latent_size, seed, device: as for
            :func:`~flr.sids.fit_codes`.
        overwrite: replace IDs that the catalogue has.
        progress: show progress bars on stderr.

    Returns:
        What ``sids.json`` holds.
    """
    dataset, read = _load(folder, overwrite)
    counts = {"iterations": iterations, "epochs": epochs, "latent_size": latent_size}
    check_sizes(len(dataset.catalogue), method, levels, codes, balance, **counts)
    embedded = embed_items(dataset, source, seed=seed, device=device, progress=progress, **embedding)
    sizes: dict[str, Any] = {"method": method, "levels": levels, "codes": codes, "balance": balance, "seed": seed}
    sizes |= {"iterations": iterations} if method == "rq-kmeans" else {"epochs": epochs, "latent_size": latent_size}
    books = fit_codes(embedded.values, device=device, progress=progress, **sizes)
    found = books.encode(embedded.values)
    sids = code_names(found)
    report = code_report(sids, codes) | {"relative_error": books.relative_errors(embedded.values, found)}
    about = {**sizes, "source": embedded.source, "report": report | {"unknown_items": embedded.empty}}
    return _write(folder, read, dataset, sids, about, books)


def import_codes(folder: PathLike, path: PathLike, *, overwrite: bool = False) -> dict[str, Any]:
    """Write IDs that others made (see :func:`flr.data.codes.read_codes`) into a folder; what ``sids.json`` holds."""
    dataset, read = _load(folder, overwrite)
    sids = read_codes(path, dataset.catalogue.item_ids)
    source = {"kind": "codes", "name": Path(path).name, "sha256": sha256(path)}
    return _write(folder, read, dataset, sids, {"method": "file", "source": source, "report": code_report(sids)}, None)


def update_codes(
    folder: PathLike,
    *,
    codebooks: PathLike | None = None,
    source: str | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: bool = True,
    **embedding: Any,
) -> dict[str, Any]:
    """Encode the items that stored codebooks have not seen; the codes of the others stay as they are.

    Args:
        folder: a prepared folder, whose catalogue has grown.
        codebooks: the folder ``sids`` of an earlier prepared folder; None for that of ``folder`` itself.
        source: where the same embedding comes from now: the .npy file with rows for the new items too, or another
            place of the same language model. None for the place that is stored.
        overwrite: replace IDs of the catalogue that differ from the stored ones.
        device, progress, embedding: as for :func:`make_codes`.

    Returns:
        What ``sids.json`` holds, ``new_items`` among it.

    Raises:
        ValueError: no codebooks, or an embedding that is not the one that they were made from.
    """
    stored = _Stored.load(Path(folder) / SIDS if codebooks is None else Path(codebooks))
    kind = stored.about["source"].get("kind")
    if kind in FITTED:
        wanted = "codebooks of a language model or a file, whose embeddings stay as items are added"
        raise ValueError(f"update: expected {wanted}, got those of {kind}: make new codes with overwrite")
    if source is None:
        if kind == "file":
            raise ValueError("embed: expected the .npy file with rows for the new items too, got none")
        source = str(stored.about["source"].get("name"))
    dataset, read = _load(folder, overwrite=True)
    old = [stored.codes.get(item_id) for item_id in dataset.catalogue.item_ids]
    known = np.array([codes is not None for codes in old])
    _check_own(dataset.catalogue, old, overwrite)
    if kind != "file":
        kept = stored.about["source"]
        embedding = embedding | {"max_tokens": kept.get("max_tokens"), "fields": kept.get("fields")}
    embedded = embed_items(dataset, source, device=device, progress=progress, **embedding)
    _check_source(stored.about["source"], embedded, stored.books)
    found = stored.books.encode(embedded.values)
    sids = code_names(found)
    equal = [own == codes for own, codes in zip(sids, old, strict=True) if codes is not None]
    if not equal or sum(equal) < _AGREEMENT * len(equal):
        wanted = (
            f"the embeddings of {stored.where}, in which at least {_AGREEMENT:.0%} of the known items keep their codes"
        )
        raise ValueError(f"embed: expected {wanted}, got {sum(equal)} of {len(equal)}")
    final = [own if codes is None else codes for own, codes in zip(sids, old, strict=True)]
    report = code_report(final, stored.books.codes)
    report |= {"relative_error": stored.books.relative_errors(embedded.values, found)}
    report |= {"unknown_items": embedded.empty, "new_items": int((~known).sum())}
    about = {name: value for name, value in stored.about.items() if name not in ("sha256", "catalogue")}
    return _write(folder, read, dataset, final, about | {"source": embedded.source, "report": report}, stored.books)


@dataclass(frozen=True)
class _Stored:
    """What a folder ``sids`` holds."""

    where: Path
    about: dict[str, Any]
    codes: dict[str, tuple[str, ...]]
    books: Codebooks

    @classmethod
    def load(cls, where: Path) -> _Stored:
        if not (where / ABOUT).is_file():
            raise ValueError(f"codebooks: expected a folder {SIDS}/ of flr sids, got {where}")
        about = read_json(where / ABOUT)
        if about.get("format") != _FORMAT or about.get("version") != _VERSION:
            got = f"{about.get('format')!r:.80} version {about.get('version')!r:.80}"
            raise ValueError(f"{where / ABOUT}: expected format {_FORMAT!r} version {_VERSION}, got {got}")
        if not isinstance(about.get("source"), dict) or not isinstance(about.get("sha256"), dict):
            raise ValueError(f"{where / ABOUT}: expected objects source and sha256, got others")
        if BOOKS not in about["sha256"]:
            raise ValueError(f"update: expected codebooks in {where}, got codes that were read from a file")
        for name in (BOOKS, INDEX):
            if not (where / name).is_file() or sha256(where / name) != about["sha256"].get(name):
                raise ValueError(
                    f"{where / name}: expected the file that was saved with {ABOUT}, got another one or none"
                )
        codes = {item_id: tuple(map(str, code)) for item_id, code in read_json(where / INDEX).items()}
        return cls(where, about, codes, Codebooks.load(where / BOOKS))


def _check_own(catalogue: Catalogue, old: Sequence[tuple[str, ...] | None], overwrite: bool) -> None:
    if catalogue.sids is None or overwrite:
        return
    for item_id, own, codes in zip(catalogue.item_ids, catalogue.sids, old, strict=True):
        if own != codes:
            wanted = "IDs of the catalogue to be those of the codebooks, or overwrite true"
            raise ValueError(f"overwrite: expected {wanted}, got {own} and {codes} for item {item_id!r}")


def _check_source(stored: dict[str, Any], embedded: Embedded, books: Codebooks) -> None:
    same = ("kind",) if stored.get("kind") == "file" else ("kind", "sha256", "max_tokens", "fields")
    for name in same:
        if stored.get(name) != embedded.source.get(name):
            got = f"{name} {embedded.source.get(name)!r:.200} and not {stored.get(name)!r:.200}"
            raise ValueError(f"embed: expected the source that the codebooks were made from, got one of {got}")
    if embedded.values.shape[1] != books.width:
        raise ValueError(f"embed: expected embeddings of {books.width} numbers, got {embedded.values.shape[1]}")


def _load(folder: PathLike, overwrite: bool) -> tuple[RecDataset, str]:
    """The data set in a folder, and the digest of its ``meta.json``, which seals all of it."""
    path = Path(folder).resolve()
    if not path.exists() and path.parent.is_dir():
        with temporary_folder(path):  # puts back what a writer that was killed had moved aside
            pass
    if not (path / META).is_file():
        raise ValueError(f"data: expected a folder that flr prepare wrote, got {folder}")
    read = sha256(path / META)
    dataset = RecDataset.load(path)
    if dataset.catalogue.sids is not None and not overwrite:
        raise ValueError(f"overwrite: expected true to replace the semantic IDs of {folder}, got false")
    return dataset, read


def _copy(root: Path, new: Path, read: str) -> None:
    """Everything but the IDs; ValueError where the folder is no longer the one whose ``meta.json`` was ``read``."""
    fault = None
    try:
        shutil.copytree(
            root,
            new,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=lambda where, _: {SIDS} if Path(where) == root else set(),
        )
    except OSError as error:  # as it comes where another writer takes the folder away
        fault = error
    if not (root / META).is_file() or sha256(root / META) != read:  # after the copy, which takes its time
        raise ValueError("data: expected the folder that was read, got one that changed meanwhile") from fault
    if fault is not None:
        raise fault


def _write(
    folder: PathLike,
    read: str,
    dataset: RecDataset,
    sids: list[tuple[str, ...]],
    about: dict[str, Any],
    books: Codebooks | None,
) -> dict[str, Any]:
    """The folder with these IDs in place of what it had: everything else is copied, and all of it appears at once."""
    old = dataset.catalogue
    catalogue = Catalogue(old.item_ids, old.titles, sids, old.attributes)
    root = Path(folder).resolve()  # where a link leads, the folder is replaced and not the link
    with atomic_folder(root) as new:
        _copy(root, new, read)
        catalogue.save(new / ITEMS)
        meta = read_json(new / META)
        if isinstance(meta.get("sha256"), dict):
            meta["sha256"][ITEMS] = sha256(new / ITEMS)
        write_json(new / META, meta)
        beside = new / SIDS
        write_json(beside / INDEX, {item_id: list(sid) for item_id, sid in zip(old.item_ids, sids, strict=True)})
        if books is not None:
            books.save(beside / BOOKS)
        digests = {path.name: sha256(path) for path in sorted(beside.iterdir())}
        about = {"format": _FORMAT, "version": _VERSION, **about, "catalogue": catalogue.digest(), "sha256": digests}
        write_json(beside / ABOUT, about)
    return about
