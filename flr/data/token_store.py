"""Every item's tokens, and their trie, in a file beside a processor: a catalogue is not tokenised at every load.

``item_tokens.safetensors`` holds the arrays, their SHA-256, and the key that they belong to: the SHA-256 of the bytes
of catalogue and tokenizer files, with the codec's settings. Where the key is not that of the files beside it, the items
are tokenised again and a warning says so; a damaged file is an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flr.files import atomic_file, check_regular, naming, sha256, shown

from .codecs import CodecName, ItemCodec
from .digests import array_digest
from .trie import CatalogueTrie

logger = logging.getLogger("flr")

STORE_NAME = "item_tokens.safetensors"
_FORMAT = "flr-item-tokens-1"
_MAX_METADATA = 1 << 16  # characters
_FILES = (
    "catalogue.parquet", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """What a store gave: the codec with its trie, and the digests of the processor that was saved with it."""

    codec: ItemCodec
    digests: dict[str, str]


def store_key(folder: Path, codec: str, max_title_tokens: int | None) -> str:
    """SHA-256, in hexadecimal, of what decides the items' tokens: files in ``folder`` and the codec's settings."""
    files = {name: sha256(folder / name) for name in _FILES if (folder / name).is_file()}
    return hashlib.sha256(json.dumps([_FORMAT, files, codec, max_title_tokens]).encode()).hexdigest()


def write_store(folder: Path, codec: ItemCodec, max_title_tokens: int | None, digests: dict[str, str]) -> None:
    """Write the tokens of ``codec`` for the catalogue and the tokenizer that lie in ``folder``."""
    arrays = {"item_tokens": torch.from_numpy(codec.tokens), "item_offsets": torch.from_numpy(codec.offsets)}
    arrays |= codec.trie().arrays()
    key = store_key(folder, codec.name, max_title_tokens)
    about = {"format": _FORMAT, "key": key, "sha256": array_digest(arrays), "digests": digests}
    with atomic_file(folder / STORE_NAME) as temporary:
        save_file(arrays, temporary, metadata={"flr": json.dumps(about)})  # one entry: the order of several varies


def read_store(folder: Path, key: str, codec: CodecName, size: int) -> Stored | None:
    """The codec of ``size`` items that was written; None where there is no file, or one that has another key.

    Raises:
        ValueError: naming the file, where it is something else or damaged.
    """
    path = folder / STORE_NAME
    if not path.exists():
        return None
    check_regular(path, "the items' tokens")
    with naming(path, "the items' tokens; delete the file, and they are made again"):
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["flr"][:_MAX_METADATA])
            if about["format"] != _FORMAT:
                raise ValueError(f"{path}: expected format {_FORMAT!r}, got {shown(about['format'], 80)}")
            if about["key"] != key:
                logger.warning(f"{path}: belongs to another catalogue or tokenizer; the items are tokenised again")
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        if about["sha256"] != array_digest(arrays):
            wanted = "the arrays that were saved; delete the file, and they are made again"
            raise ValueError(f"{path}: expected {wanted}, got others (the digest differs)")
        tokens, offsets = (arrays.pop(name).numpy() for name in ("item_tokens", "item_offsets"))
        trie = CatalogueTrie.from_arrays(path, arrays)
        _check(tokens, offsets, trie, size)
        return Stored(ItemCodec.known(codec, tokens, offsets, trie), about["digests"])


def _check(tokens: np.ndarray, offsets: np.ndarray, trie: CatalogueTrie, size: int) -> None:
    whole = tokens.dtype == np.int32 and offsets.dtype == np.int64 and tokens.ndim == offsets.ndim == 1
    if not whole or len(offsets) != size + 1 or trie.num_items != size:
        raise ValueError(f"item_tokens: expected those of {size} items, got {len(offsets) - 1} and {trie.num_items}")
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
        raise ValueError(f"item_offsets: expected to rise from 0 to {len(tokens)}, got {offsets[0]}..{offsets[-1]}")
