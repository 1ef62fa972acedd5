"""A saved tokenizer, read so that nothing in its folder decides what code runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flr.files import PathLike, read_json

#: Where the tokenizer was read from, which transformers notes in it and writes into the next tokenizer_config.json.
_NOTES = ("is_local", "local_files_only", "gguf_file")


def load_tokenizer(folder: PathLike, tokenizer_class: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer in ``folder``, without any code that lies there.

    Args:
        folder: what ``tokenizer.save_pretrained`` wrote.
        tokenizer_class: name of its class in transformers; None, or a name that is not there, leaves it to
            ``AutoTokenizer``, which goes by tokenizer_config.json and config.json.
        gguf_file: name of the file in ``folder`` that holds the tokenizer, where a GGUF file does.

    Raises:
        ValueError: a file names what is no tokenizer class, or the tokenizer needs code of its own.
        OSError: no tokenizer is there.
    """
    path = Path(folder)
    chosen = None if tokenizer_class is None else _known(tokenizer_class, "tokenizer_class")
    for file in (path / "tokenizer_config.json", path / "config.json"):
        if file.is_file():
            _known(read_json(file).get("tokenizer_class"), f"{file}: tokenizer_class")
    where = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = (chosen or AutoTokenizer).from_pretrained(path, trust_remote_code=False, **where)
    for name in _NOTES:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _known(name: Any, label: str) -> Any:
    """The class of this name in transformers, None where there is none; ValueError where it is no tokenizer's."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"{label}: expected a name, got {type(name).__name__}")
    found = getattr(transformers, name, None)
    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    if found is None or is_tokenizer or hasattr(found, "_backends"):  # the last says itself which package it misses
        return found
    raise ValueError(f"{label}: expected a tokenizer class of transformers, got {name!r}")
