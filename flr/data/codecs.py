"""Item codecs: every item of a catalogue as a token sequence, unique and prefix-free over the catalogue.

Unique: decoding a sequence gives one item, even where items share a title or a semantic ID. Prefix-free: no item's
sequence begins another's, so a decoder knows where an item ends and the probabilities of items sum to at most 1.

    title   tokens of the title [same_n] end      same_n: only where items share a title, n = 0, 1, … in catalogue order
    sid     codes of the semantic ID [same_n]     plus end, for every item, where IDs of different lengths need it
    id      one token

Codes, ids, same_n and end are single tokens of the tokenizer. The missing ones are added in one order that depends on
the catalogue alone, so that building again with the saved tokenizer adds nothing and gives the same sequences.

A catalogue that grows keeps the tokens of its items: what a later item shares with an earlier one shows in the later
item alone. Of a title the second item has same_1 and the first one no same_0; of a semantic ID, which may end there,
the later item has a same_n in the place of its last code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
from tokenizers import AddedToken

from .catalogue import Catalogue
from .csr import CSR, numbered, places_within
from .trie import CatalogueTrie

CodecName = Literal["title", "sid", "id"]
CODEC_NAMES: tuple[CodecName, ...] = ("title", "sid", "id")
END_TOKEN = "<|item_end|>"
_CHUNK = 16384  # titles a tokenizer call


@dataclass(frozen=True, eq=False)
class ItemCodec:
    """Token sequences of every item of a catalogue, as CSR.

    Attributes:
        name: "title", "sid" or "id".
        tokens: int32 [total], token ids.
        offsets: int64 [C + 1]; item i is ``tokens[offsets[i]:offsets[i + 1]]``, terminator included.

    Raises:
        ValueError: two items with the same sequence, a sequence that begins another, or an empty one.

    Example:
        >>> codec = ItemCodec("sid", np.array([7, 8, 7, 9], np.int32), np.array([0, 2, 4]))
        >>> codec.encode(1), codec.decode([7, 8])
        ([7, 9], 0)
        >>> ItemCodec("sid", np.array([7, 7, 9], np.int32), np.array([0, 1, 3]))
        Traceback (most recent call last):
        ...
        ValueError: sequences: expected no item's tokens to begin another's, got item 0 [7] that begins item 1 [7, 9]
    """

    name: CodecName
    tokens: np.ndarray
    offsets: np.ndarray
    _index: dict[bytes, int] = field(default_factory=dict, init=False, repr=False)
    _trie: CatalogueTrie | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", np.ascontiguousarray(self.tokens, np.int32))
        object.__setattr__(self, "offsets", np.ascontiguousarray(self.offsets, np.int64))
        if self.name not in CODEC_NAMES:
            raise ValueError(f"name: expected one of {CODEC_NAMES}, got {self.name!r}")
        clash = find_prefix(CSR(self.tokens, self.offsets))
        if clash is not None:
            short, long = (f"item {item} {self.encode(item)}" for item in clash)
            raise ValueError(f"sequences: expected no item's tokens to begin another's, got {short} that begins {long}")

    @classmethod
    def known(cls, name: CodecName, tokens: np.ndarray, offsets: np.ndarray, trie: CatalogueTrie) -> ItemCodec:
        """A codec that was whole when it was saved, with its trie: nothing is checked again."""
        codec = object.__new__(cls)
        parts: dict[str, Any] = {"name": name, "tokens": tokens, "offsets": offsets, "_index": {}, "_trie": trie}
        for field_name, value in parts.items():
            object.__setattr__(codec, field_name, value)
        return codec

    def trie(self) -> CatalogueTrie:
        """The trie of all sequences, on the CPU, made at first use."""
        if self._trie is None:
            object.__setattr__(self, "_trie", CatalogueTrie.from_sequences(self.tokens, self.offsets))
        assert self._trie is not None
        return self._trie

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every item, int64 [C]."""
        return np.diff(self.offsets)

    def encode(self, item: int) -> list[int]:
        """Token ids of item index ``item``."""
        if not 0 <= item < len(self):
            raise ValueError(f"item: expected an index in 0..{len(self) - 1}, got {item}")
        return self.tokens[self.offsets[item] : self.offsets[item + 1]].tolist()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Item index of a complete sequence; ValueError where ``tokens`` is no item's."""
        if not self._index:
            self._index.update((key, item) for item, key in enumerate(_keys(CSR(self.tokens, self.offsets))))
        array = np.asarray(tokens)
        item = self._index.get(array.astype(">i4").tobytes()) if array.ndim == 1 and array.size else None
        if item is None:
            raise ValueError(f"tokens: expected the sequence of an item, got {array.tolist()}")
        return item


def build_codec(
    name: str,
    catalogue: Catalogue,
    tokenizer: Any,
    *,
    max_title_tokens: int | None = None,
    growth: Sequence[int] = (),
) -> ItemCodec:
    """Token sequences of ``catalogue`` in the form ``name`` ("title", "sid" or "id").

    Adds the tokens it needs to ``tokenizer`` (a fast Hugging Face tokenizer) in at most one call a kind; calling again
    with the same or the saved tokenizer adds nothing and gives the same codec. ``max_title_tokens`` (title only) cuts
    long titles; titles that become equal by the cut are told apart like equal titles. ``growth`` holds the sizes, in
    ascending order, that the catalogue had before items were added: the first ``growth[k]`` items have the tokens that
    they had then.

    Example:
        >>> from flr.data import Catalogue, build_tokenizer
        >>> catalogue = Catalogue(["x", "y"], ["Blue", "Blue"])
        >>> tokenizer = build_tokenizer(catalogue, "title", vocab_size=300)
        >>> codec = build_codec("title", catalogue, tokenizer)
        >>> tokenizer.decode(codec.encode(1))
        'Blue<|same_1|><|item_end|>'
    """
    if len(catalogue) == 0:
        raise ValueError("catalogue: expected at least one item, got none")
    if max_title_tokens is not None and (name != "title" or max_title_tokens < 1):
        raise ValueError(
            f"max_title_tokens: expected None, or >= 1 with codec 'title', got {max_title_tokens}, {name!r}"
        )
    sizes = [*growth, len(catalogue)]
    if sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"growth: expected ascending sizes in 1..{len(catalogue) - 1}, got {list(growth)!r:.80}")
    if name == "id":
        tokens = token_ids(tokenizer, item_tokens(len(catalogue)), special=False)
        sequences = CSR(tokens, np.arange(len(catalogue) + 1, dtype=np.int64))
    elif name == "sid":
        sequences = _sid_sequences(catalogue, tokenizer, growth)
    elif name == "title":
        end = int(token_ids(tokenizer, [END_TOKEN], special=True)[0])
        bodies = title_tokens(catalogue.titles, tokenizer)
        if max_title_tokens is not None:
            starts, ends = bodies.offsets[:-1], bodies.offsets[1:]
            bodies = bodies.slice(starts, np.minimum(ends, starts + max_title_tokens))
        sequences = _append(_disambiguate(bodies, tokenizer, growth)[0], end)
    else:
        raise ValueError(f"name: expected one of {CODEC_NAMES}, got {name!r}")
    return ItemCodec(cast(CodecName, name), sequences.values, sequences.offsets)


def item_tokens(size: int) -> list[str]:
    """Names of the tokens of codec "id", in catalogue order."""
    return [f"<|item_{index}|>" for index in range(size)]


def sid_tokens(catalogue: Catalogue) -> list[str]:
    """The different codes of the catalogue's semantic IDs, in natural order (a_2 before a_10)."""
    if catalogue.sids is None:
        raise ValueError("catalogue: expected semantic IDs for codec 'sid', got a catalogue without sids")
    return sorted({code for sid in catalogue.sids for code in sid}, key=_natural)


def token_ids(tokenizer: Any, names: Sequence[str], special: bool) -> np.ndarray:
    """Ids of the tokens ``names``, int32 [len(names)]; the missing ones are added, in that order, in one call."""
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    if missing:
        added = [AddedToken(name, special=special, normalized=False) for name in missing]
        tokenizer.add_tokens(added, special_tokens=special)
        vocabulary = tokenizer.get_vocab()
    lost = [name for name in names if name not in vocabulary]
    if lost:
        raise ValueError(f"tokenizer: expected to hold {lost[0]!r} after adding it, got {len(lost)} such tokens lost")
    return np.fromiter((vocabulary[name] for name in names), np.int32, len(names))


def find_prefix(sequences: CSR) -> tuple[int, int] | None:
    """A pair (i, j) of rows where row i is equal to the beginning of row j, or None where ``sequences`` is prefix-free.

    Sorted, a row that begins another also begins its next neighbour, so one sort and C comparisons are enough
    (10^6 rows take a few seconds). An empty row begins every other one.
    """
    keys = _keys(sequences)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for short, long in pairwise(order):
        if keys[long].startswith(keys[short]):
            return short, long
    return (0, 0) if len(keys) == 1 and not keys[0] else None


def _keys(sequences: CSR) -> list[bytes]:
    """Rows as big-endian bytes: they sort as the token sequences do (ids are not negative), shorter first."""
    data = sequences.values.astype(">i4").tobytes()
    bounds = (sequences.offsets * 4).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


def _groups(sequences: CSR) -> tuple[np.ndarray, np.ndarray]:
    """Group number of every row (equal rows share one) and its rank in the group by row number, int64 [rows] each."""
    group = numbered(_keys(sequences))
    rank = np.empty(len(group), np.int64)
    rank[np.argsort(group, kind="stable")] = places_within(np.bincount(group))
    return group, rank


def _disambiguate(sequences: CSR, tokenizer: Any, growth: Sequence[int] = ()) -> tuple[CSR, np.ndarray]:
    """Append one token same_n to the members of every group of equal rows.

    A row that stood alone when rows were added (``growth``) stays as it was; bool [rows] marks those that begin with
    such a row for that reason.
    """
    group, rank = _groups(sequences)
    stage = np.searchsorted(growth, np.arange(len(group)), side="right")
    last = np.zeros((int(group.max()) + 1, len(growth) + 1), np.int64)  # rank of a group's last member by then
    np.maximum.at(last, (group, stage), rank)
    shared = np.maximum.accumulate(last, 1)[group, stage] > 0
    if not shared.any():
        return sequences, shared
    first = np.zeros(len(last), bool)  # whether a group's first member is told apart
    first[group[rank == 0]] = shared[rank == 0]
    extra = token_ids(tokenizer, [f"<|same_{n}|>" for n in range(int(rank[shared].max()) + 1)], special=True)
    return _append(sequences, extra[rank], shared), shared & ~first[group]


def _append(sequences: CSR, tokens: np.ndarray | int, where: np.ndarray | None = None) -> CSR:
    """One more token at the end of the rows that ``where`` (bool [rows], default all) marks."""
    rows = len(sequences.offsets) - 1
    mask = np.ones(rows, bool) if where is None else where
    places = sequences.offsets[1:][mask]
    values = np.insert(sequences.values, places, np.broadcast_to(tokens, (rows,))[mask])
    offsets = sequences.offsets.copy()
    offsets[1:] += np.cumsum(mask)
    return CSR(values.astype(np.int32), offsets)


def _sid_sequences(catalogue: Catalogue, tokenizer: Any, growth: Sequence[int]) -> CSR:
    names = sid_tokens(catalogue)
    ids = dict(zip(names, token_ids(tokenizer, names, special=False).tolist(), strict=True))
    if len(set(ids.values())) != len(ids):
        raise ValueError("tokenizer: expected different ids for different codes of the semantic IDs, got equal ones")
    codes = CSR.from_rows([[ids[code] for code in sid] for sid in cast(list[tuple[str, ...]], catalogue.sids)])
    sequences, late = _disambiguate(codes, tokenizer, growth)
    at_first = np.arange(growth[0] if growth else len(catalogue))
    if find_prefix(sequences.take(at_first)) is not None:  # IDs of different lengths
        return _append(sequences, int(token_ids(tokenizer, [END_TOKEN], special=True)[0]))
    return _without_last_code(sequences, late, tokenizer)


def _without_last_code(sequences: CSR, late: np.ndarray, tokenizer: Any) -> CSR:
    """The rows that ``late`` marks, codes and a same_n, as all codes but the last and a same_n of their own."""
    rows = np.flatnonzero(late)
    if not rows.size:
        return sequences
    starts, ends = sequences.offsets[rows], sequences.offsets[rows + 1] - 2
    _, rank = _groups(sequences.slice(starts, ends))
    extra = token_ids(tokenizer, [f"<|same_{n}|>" for n in range(int(rank.max()) + 1)], special=True)
    values, keep = sequences.values.copy(), np.ones(len(sequences.values), bool)
    values[ends] = extra[rank]
    keep[ends + 1] = False
    offsets = sequences.offsets.copy()
    offsets[1:] -= np.cumsum(late)
    return CSR(values[keep], offsets)


def title_tokens(titles: list[str], tokenizer: Any) -> CSR:
    """Token ids of titles as plain text. Text that looks like a token (as "<|item_end|>") never becomes that token.

    Our own tokens all begin with "<|", so such titles are tokenised in pieces cut between "<" and "|", whether or not
    the tokens have been added yet; that keeps the result the same before and after they are. Other special tokens are
    caught afterwards, by tokenising such a title one character at a time.
    """
    rows = _encode_text(titles, tokenizer)
    for index, title in enumerate(titles):
        if "<|" in title:
            rows[index] = _encode_pieces(re.split(r"(?<=<)(?=\|)", title), tokenizer)
    reserved = np.array(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}), np.int64)
    unknown = getattr(tokenizer, "unk_token_id", None)
    reserved = reserved[reserved != (-1 if unknown is None else unknown)]
    sequences = CSR.from_rows(rows)
    if unknown is not None and np.count_nonzero(sequences.values == unknown) > len(sequences.values) // 2:
        raise ValueError("tokenizer: expected one built for codec 'title', got mostly unknown tokens for the titles")
    hits = np.flatnonzero(np.isin(sequences.values, reserved))
    guilty = np.unique(np.searchsorted(sequences.offsets, hits, side="right") - 1)
    for index in guilty.tolist():
        rows[index] = _encode_pieces(list(titles[index]), tokenizer)
    return CSR.from_rows(rows) if guilty.size else sequences


def _encode_pieces(pieces: Iterable[str], tokenizer: Any) -> list[int]:
    return [token for piece in _encode_text(list(pieces), tokenizer) for token in piece]


def _encode_text(texts: list[str], tokenizer: Any) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk, plain = texts[start : start + _CHUNK], {"return_attention_mask": False, "return_token_type_ids": False}
        rows.extend(tokenizer(chunk, add_special_tokens=False, **plain)["input_ids"])
    return rows


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
