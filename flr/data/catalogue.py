"""The catalogue: C items in a fixed order, each with an id, a title and, where there is one, a semantic ID.

Everything inside the package speaks of an item by its index 0..C-1; ids and titles are for people and files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flr.files import PathLike, naming, read_parquet, write_parquet

from .frames import TEXT, as_table, column_names, find_column, has_column, holds_text, id_column, is_text, plain_array
from .text_index import TextColumn, TextIndex

_ATTRIBUTE_PREFIX = "attribute:"
_SURROGATE = re.compile("[\ud800-\udfff]")
_PART = 1 << 16  # texts that are joined at a time
_SUGGESTIONS = 5
_LIKENESS, _PART_LIKENESS = 70, 85  # of 100, below which nothing is suggested


class Catalogue:
    """Items of a recommendation problem, in a fixed order.

    Args:
        item_ids: external ids, one an item, strings, all different, none empty.
        titles: one an item; titles may repeat and may be empty.
        sids: semantic IDs, one tuple of code strings an item (tuples may repeat and may differ in length), or None.
        attributes: one value an item by attribute name, e.g. ``{"interest": int array [C]}``; integer, float, bool or
            text, which is kept as NumPy's ``StringDType``.

    Raises:
        ValueError: lengths that differ, ids that repeat, or text that is not valid Unicode.

    Example:
        >>> catalogue = Catalogue(["a1", "a2", "a3"], ["Kind of Blue", "Blue Train", "Blue Train"])
        >>> len(catalogue), catalogue.index("a2")
        (3, 1)
        >>> catalogue.find("a1"), catalogue.find("Blue Train"), catalogue.find("kind of blue")
        ([0], [1, 2], [0])
    """

    def __init__(
        self,
        item_ids: Iterable[str],
        titles: Iterable[str],
        sids: Iterable[Sequence[str]] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.item_ids: list[str] = list(item_ids)
        self.titles: list[str] = list(titles)
        self.sids: list[tuple[str, ...]] | None = None if sids is None else [tuple(sid) for sid in sids]
        self.attributes: dict[str, np.ndarray] = {}
        size = len(self.item_ids)
        _check_text("item_ids", self.item_ids, empty=False)
        for name, given in (("titles", self.titles), ("sids", self.sids)):
            if given is not None and len(given) != size:
                raise ValueError(f"{name}: expected one an item ({size}), got {len(given)}")
        _check_text("titles", self.titles, empty=True)
        if self.sids is not None:
            for position, sid in enumerate(self.sids):
                if not sid:
                    raise ValueError(f"sids: expected at least one code an item, got none at {position}")
            _check_text("sids", sorted({code for sid in self.sids for code in sid}), empty=False)
        self._index = TextIndex(self.item_ids)
        if (place := self._index.repeated()) is not None:
            twice, different = self.item_ids[place], len(set(self.item_ids))
            raise ValueError(f"item_ids: expected {size} different ids, got {different} ({twice!r} repeats)")
        for name, values in (attributes or {}).items():
            self.attributes[name] = _attribute(name, values, size)
        self._by_title: TextIndex | None = None
        self._by_folded: TextIndex | None = None
        self._by_text: dict[str, TextColumn] = {}

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        item: str | None = None,
        title: str | None = None,
        sid: str | None = None,
        attributes: Sequence[str] = (),
    ) -> Catalogue:
        """Items of a table in memory, in its order.

        Args:
            frame: one row an item; pandas, polars, pyarrow, ``datasets.Dataset`` (see :mod:`flr.data.frames`).
            item: column of ids, text or integers; None for "item_id" or "item".
            title: column of text; None for "title", and without one an item's id is its title, as it is for a null.
            sid: column of semantic IDs, lists of codes or text (one code); None for "sid", if there is one.
            attributes: columns of numbers, bools, text or moments without nulls to keep as attributes (moments as
                seconds since 1970).

        Raises:
            ValueError: a column that is missing or of another type, an id that is null, empty or repeated.

        Example:
            >>> Catalogue.from_frame(pa.table({"item_id": [3, 1], "title": ["Blue", None]})).titles
            ['Blue', '1']
        """
        names = column_names(frame, "frame")
        asked = {"item": item, "title": title, "sid": sid}
        roles = [role for role, given in asked.items() if role == "item" or has_column(names, role, given)]
        columns = {role: find_column(names, role, asked[role], "frame") for role in roles}
        lost = [column for column in attributes if list(names).count(column) != 1]
        if lost:
            raise ValueError(f"frame: expected one column {lost[0]!r} (attributes=), got {list(names)}")
        table = as_table(frame, "frame", list(dict.fromkeys([*columns.values(), *attributes])))
        return cls.from_table(table, columns, attributes, "frame")

    @classmethod
    def from_table(cls, table: pa.Table, columns: Mapping[str, str], attributes: Iterable[str], name: str) -> Catalogue:
        """As :meth:`from_frame`, with the columns by role ("item", "title", "sid"); ``name`` is what errors say."""
        ids = id_column(table, columns["item"], name).to_pylist()
        for row, item_id in enumerate(ids, 1):
            if not item_id:
                raise ValueError(f"{name}: column {columns['item']!r}: expected an id, got {item_id!r} in row {row}")
        titles, sids = ids, None
        if "title" in columns:
            kind = table.schema.field(columns["title"]).type
            if not (holds_text(kind) or pa.types.is_null(kind)):
                raise ValueError(f"{name}: column {columns['title']!r}: expected text, got {kind}")
            listed = table[columns["title"]].to_pylist()
            titles = [title or item_id for item_id, title in zip(ids, listed, strict=True)]
        if "sid" in columns:
            sids = [_codes_of(sid, f"{name}: column {columns['sid']!r}") for sid in table[columns["sid"]].to_pylist()]
        values: dict[str, np.ndarray] = {}
        for column in attributes:
            array = plain_array(table[column])
            if array is None:
                got = f"{table.schema.field(column).type}, {table[column].null_count} nulls"
                raise ValueError(f"{name}: column {column!r}: expected numbers, bools or text without nulls, got {got}")
            values[column] = array
        try:
            return cls(ids, titles, sids, values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        forms = "ids, titles" + ("" if self.sids is None else ", semantic IDs")
        extra = f", attributes {sorted(self.attributes)}" if self.attributes else ""
        return f"Catalogue({len(self)} items: {forms}{extra})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Catalogue):
            return NotImplemented
        return (
            self.item_ids == other.item_ids
            and self.titles == other.titles
            and self.sids == other.sids
            and self.attributes.keys() == other.attributes.keys()
            and all(
                values.dtype.kind == other.attributes[name].dtype.kind
                and np.array_equal(values, other.attributes[name], equal_nan=values.dtype.kind == "f")
                for name, values in self.attributes.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def index(self, item_id: str) -> int:
        """Index 0..C-1 of an id; ValueError naming the id (and near ones) where the catalogue has no such item."""
        position = self._index.first(item_id)
        if position is None:
            near = _hint(item_id, self.item_ids)
            raise ValueError(f"item_id: expected an id of the catalogue, got {item_id!r}{near}")
        return position

    def find(self, text: str) -> list[int]:
        """Indices of the items that ``text`` names: by id, else by exact title, else by title ignoring case and spaces.

        Several items can share a title, so the answer may hold several indices (in catalogue order).
        ValueError with the nearest titles where nothing matches.
        """
        if indices := self.lookup(text):
            return indices
        near = _hint(text, self.titles)
        raise ValueError(f"text: expected an id or a title of the catalogue, got {text!r}{near}")

    def lookup(self, text: str) -> list[int]:
        """As :meth:`find`, but an empty list and no search for suggestions where nothing matches. Safe in threads."""
        if (position := self._index.first(text)) is not None:
            return [position]
        if self._by_title is None:
            self._by_title = TextIndex(self.titles)  # assigned when complete: another thread may look at any time
        if found := self._by_title(text):
            return found
        if self._by_folded is None:
            self._by_folded = TextIndex(self.titles, _fold)
        return self._by_folded(text)

    def having_text(self, attribute: str, texts: Iterable[str]) -> np.ndarray:
        """bool [C]: which items have one of these texts as an attribute of text. Safe in threads.

        The attribute cannot be changed in place afterwards; another array may be put in its place.
        """
        values, known = self.attributes[attribute], self._by_text.get(attribute)
        if known is None or known.column is not values or values.flags.writeable:  # so are those of a copy
            known = self._by_text[attribute] = TextColumn(values)
        return known(texts)

    def suggest(self, text: str) -> str:
        """The end of an error about an unknown id or title: "; did you mean …?" with near ids and titles, or ""."""
        return _hint(text, self.item_ids, self.titles)

    def save(self, path: PathLike) -> None:
        """Write one Parquet file (columns item_id, title, sid, attribute:NAME), atomically."""
        columns: dict[str, pa.Array] = {
            "item_id": pa.array(self.item_ids, pa.string()),
            "title": pa.array(self.titles, pa.string()),
        }
        if self.sids is not None:
            columns["sid"] = pa.array(self.sids, pa.list_(pa.string()))
        for name, values in self.attributes.items():
            columns[_ATTRIBUTE_PREFIX + name] = pa.array(values.tolist() if values.dtype == TEXT else values)
        metadata = {"flr": json.dumps({"kind": "catalogue", "version": 1})}
        write_parquet(path, pa.table(columns).replace_schema_metadata(metadata))

    @classmethod
    def load(cls, path: PathLike) -> Catalogue:
        """Read what :meth:`save` wrote; ValueError where the file is missing or has other columns."""
        table = read_parquet(path, {"item_id": is_text, "title": is_text})
        with naming(path, "the catalogue that was saved"):
            sids = table["sid"].to_pylist() if "sid" in table.column_names else None
            attributes: dict[str, Any] = {}
            for name in table.column_names:
                if name.startswith(_ATTRIBUTE_PREFIX):
                    array = plain_array(table[name])
                    if array is None:
                        wanted = "numbers, bools or text without nulls"
                        raise ValueError(f"column {name!r}: expected {wanted}, got {table[name].type}")
                    attributes[name[len(_ATTRIBUTE_PREFIX) :]] = array
            return cls(table["item_id"].to_pylist(), table["title"].to_pylist(), sids, attributes)

    def digest(self) -> str:
        """SHA-256 of ids, titles and semantic IDs in their order, in hexadecimal.

        >>> Catalogue(["x", "y"], ["Blue", "Red"]).digest() == Catalogue(["y", "x"], ["Red", "Blue"]).digest()
        False
        """
        digest = hashlib.sha256(b"[")
        for place, values in enumerate((self.item_ids, self.titles, self.sids)):
            digest.update(b"," if place else b"")
            for part in _as_json(values):
                digest.update(part.encode())
        digest.update(b"]")
        return digest.hexdigest()


def _as_json(values: Sequence[Any] | None) -> Iterator[str]:
    """A list as JSON without spaces, in parts."""
    if not values:
        yield "null" if values is None else "[]"
        return
    for start in range(0, len(values), _PART):
        text = json.dumps(values[start : start + _PART], ensure_ascii=False, separators=(",", ":"))
        yield f"{',' if start else '['}{text[1:-1]}"
    yield "]"


def _codes_of(sid: Any, name: str) -> tuple[str, ...]:
    codes = (sid,) if isinstance(sid, str) else sid
    if not isinstance(codes, (list, tuple)) or not all(isinstance(code, str) for code in codes):
        raise ValueError(f"{name}: expected text or a list of codes for every item, got {sid!r:.80}")
    return tuple(codes)


def _check_text(name: str, values: Sequence[Any], empty: bool) -> None:
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected strings, got {type(value).__name__} {value!r} at {position}")
        if not value and not empty:
            raise ValueError(f"{name}: expected text, got an empty string at {position}")
    for start in range(0, len(values), _PART):
        try:
            "".join(values[start : start + _PART]).encode("utf-8")
        except UnicodeEncodeError:  # noqa: PERF203, once a part
            position = next(place for place, value in enumerate(values) if _SURROGATE.search(value))
            raise ValueError(f"{name}: expected valid Unicode, got {values[position]!r} at {position}") from None


def _attribute(name: str, values: Any, size: int) -> np.ndarray:
    if isinstance(values, (list, tuple)) and values and all(isinstance(value, str) for value in values):
        values = np.array(values, object)  # never as wide as the longest
    array = np.asarray(values)
    if array.dtype.kind in "UT" or (array.dtype.kind == "O" and all(isinstance(x, str) for x in array.tolist())):
        _check_text(f"attributes[{name!r}]", array.ravel().tolist(), empty=True)
        array = array.astype(TEXT)
    if array.shape != (size,):
        raise ValueError(f"attributes[{name!r}]: expected shape ({size},), got {array.shape}")
    if array.dtype.kind not in "iufbT":
        raise ValueError(f"attributes[{name!r}]: expected integers, floats, bools or strings, got dtype {array.dtype}")
    return array


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _hint(text: str, *pools: Sequence[str]) -> str:
    """What to suggest after "not found": what is near in each pool."""
    near = [repr(candidate) for pool in pools for candidate in _near(text, pool)]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _near(text: str, candidates: Sequence[str]) -> list[str]:
    """The most alike candidates by rapidfuzz, words in any order; where there are none, those that hold such a part."""
    from rapidfuzz import fuzz, process  # here: few programs make mistakes

    for scorer, likeness in ((fuzz.token_sort_ratio, _LIKENESS), (fuzz.partial_ratio, _PART_LIKENESS)):
        about: dict[str, Any] = {"scorer": scorer, "score_cutoff": likeness, "limit": _SUGGESTIONS}
        if found := process.extract(_fold(text), candidates, processor=str.casefold, **about):
            return list(dict.fromkeys(name for name, _, _ in found))
    return []
