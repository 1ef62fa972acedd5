"""A catalogue that takes in what a later one brings: known items keep their places, new ones follow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flr.files import shown

from .catalogue import Catalogue
from .csr import CSR, offsets_of
from .frames import TEXT
from .interactions import Interactions, RecDataset


class Growth(NamedTuple):
    """What became of two catalogues.

    Attributes:
        catalogue: the known items in their places, with their titles and codes, then the new ones.
        places: int64 [later items], the index in ``catalogue`` of every item of the later one.
        absent: known items that the later one lacks; they stay.
        retitled: items whose title is another one there; they keep theirs.
        left_out: attributes that the later one has for some items only.
    """

    catalogue: Catalogue
    places: np.ndarray
    absent: int
    retitled: int
    left_out: list[str]


def grow_catalogue(known: Catalogue, later: Catalogue, codes: bool = False) -> Growth:
    """``known`` with the items of ``later`` that it lacks, in their order, at its end.

    Attributes are those of ``later`` where it has the item, else those of ``known``. Titles and semantic IDs of known
    items never change, since their tokens may be made of them.

    Args:
        known: the items of a model.
        later: items of another time: some or all of them, and others.
        codes: items are written by semantic IDs, which ``later`` must have, the same for known items.

    Raises:
        ValueError: ``later`` lacks semantic IDs or has others, or lacks an attribute; or most of its titles are others:
            it is of other items that have the same ids.

    Example:
        >>> grown = grow_catalogue(Catalogue(["x", "y"], ["Blue", "Red"]), Catalogue(["z", "x"], ["Gold", "Blue"]))
        >>> grown.catalogue.item_ids, grown.places.tolist(), grown.absent
        (['x', 'y', 'z'], [2, 0], 1)
    """
    index = {item_id: place for place, item_id in enumerate(known.item_ids)}
    new = [place for place, item_id in enumerate(later.item_ids) if item_id not in index]
    index |= {later.item_ids[place]: len(known) + number for number, place in enumerate(new)}
    places = np.array([index[item_id] for item_id in later.item_ids], np.int64)
    common = np.flatnonzero(places < len(known))
    sids = _codes(known, later, places, common.tolist(), new, codes)
    retitled = _retitled(known, later, places)
    absent = len(known) - len(common)
    lost = [name for name in known.attributes if name not in later.attributes]
    if lost and new:
        got = f"{shown(sorted(later.attributes))} for {len(new)} new items"
        raise ValueError(f"data: expected the attribute {lost[0]!r} of the model's catalogue, got {got}")
    left_out = [name for name in later.attributes if name not in known.attributes and absent]
    attributes = {}
    for name in dict.fromkeys((*known.attributes, *later.attributes)):
        if name not in left_out:
            attributes[name] = _attribute(name, known, later, places, len(index))
    catalogue = Catalogue(
        [*known.item_ids, *(later.item_ids[place] for place in new)],
        [*known.titles, *(later.titles[place] for place in new)],
        sids,
        attributes,
    )
    return Growth(catalogue, places, absent, retitled, left_out)


def _retitled(known: Catalogue, later: Catalogue, places: np.ndarray) -> int:
    """How many items have another title in ``later``, whose item i is ``places[i]`` of ``known``."""
    common = [place for place, item in enumerate(places.tolist()) if item < len(known)]
    differing = [place for place in common if known.titles[places[place]] != later.titles[place]]
    if 2 * len(differing) > len(common):
        first = differing[0]
        wanted = f"the model's items, as {known.titles[places[first]]!r:.80} for {later.item_ids[first]!r:.80}"
        got = f"{later.titles[first]!r:.80}, and other titles for {len(differing)} of {len(common)} items"
        raise ValueError(f"data: expected {wanted}, got {got}")
    return len(differing)


def _codes(
    known: Catalogue, later: Catalogue, places: np.ndarray, common: list[int], new: list[int], codes: bool
) -> list[tuple[str, ...]] | None:
    if known.sids is None or (later.sids is None and not codes and new):
        return None
    if later.sids is None:
        if new:
            wanted = "semantic IDs for its new items, by the codebooks of the known ones (flr sids --update true)"
            raise ValueError(f"data: expected {wanted}, got none for {len(new)}")
        return known.sids
    for place in common if codes else []:
        if (own := known.sids[places[place]]) != later.sids[place]:
            wanted = f"the codes {own} of the model for item {later.item_ids[place]!r} (flr sids --update true)"
            raise ValueError(f"data: expected {wanted}, got {later.sids[place]}")
    return [*known.sids, *(later.sids[place] for place in new)]


def _attribute(name: str, known: Catalogue, later: Catalogue, places: np.ndarray, size: int) -> np.ndarray:
    if name not in later.attributes:
        return known.attributes[name]
    values = later.attributes[name]
    if name in known.attributes:
        before = known.attributes[name]
        if (before.dtype == TEXT) != (values.dtype == TEXT):
            raise ValueError(f"data: expected {before.dtype} in the attribute {name!r}, got {values.dtype}")
        kind = np.result_type(before.dtype, values.dtype)
        whole = np.zeros(size, kind)
        whole[: len(before)] = before
    else:
        whole = np.zeros(size, values.dtype)
    whole[places] = values
    return whole


def in_catalogue(dataset: RecDataset, catalogue: Catalogue, model: str) -> RecDataset:
    """``dataset`` over the items of ``model``, among which all of its own must be, in any order.

    Raises:
        ValueError: items that the model does not know, or that are others there.
    """
    if dataset.catalogue.item_ids == catalogue.item_ids:
        return dataset
    index = {item_id: place for place, item_id in enumerate(catalogue.item_ids)}
    unknown = [item_id for item_id in dataset.catalogue.item_ids if item_id not in index]
    if unknown:
        got = f"{shown(unknown[0], 80)} and {len(unknown) - 1} others that it lacks"
        raise ValueError(f"data: expected the catalogue that {model} was trained on, or items of it, got {got}")
    places = np.array([index[item_id] for item_id in dataset.catalogue.item_ids], np.int64)
    _retitled(catalogue, dataset.catalogue, places)
    train, valid, test = (replaced(part, places) for part in (dataset.train, dataset.valid, dataset.test))
    return RecDataset(catalogue, train, valid, test, dataset.name, dataset.report)


def replaced(rows: Interactions, places: np.ndarray) -> Interactions:
    """The rows with item ``places[i]`` in the place of item i."""
    histories = CSR(places[rows.histories.values], rows.histories.offsets)
    return Interactions(rows.users, histories, places[rows.targets], rows.timestamps)


def joined(*parts: Interactions) -> Interactions:
    """The rows of all parts, one after the other; times only where all have them."""
    histories = CSR(
        np.concatenate([part.histories.values for part in parts]),
        offsets_of(np.concatenate([part.histories.lengths for part in parts])),
    )
    times = [part.timestamps for part in parts if part.timestamps is not None]
    return Interactions(
        [user for part in parts for user in part.users],
        histories,
        np.concatenate([part.targets for part in parts]),
        np.concatenate(times) if len(times) == len(parts) else None,
    )


def cut(rows: Interactions, num_items: int) -> tuple[Interactions, np.ndarray]:
    """The rows whose target is one of the first ``num_items`` items, other items of their histories left out.

    Returns:
        These rows, and bool [rows] of the given ones, which they are.
    """
    kept = rows.targets < num_items
    some = rows.select(kept)
    known = some.histories.values < num_items
    ends = np.concatenate(([0], np.cumsum(known)))[some.histories.offsets]
    return Interactions(some.users, CSR(some.histories.values[known], ends), some.targets, some.timestamps), kept
