"""What keeps loaders that would leave out the thought from an adapter of a patched model.

PEFT and transformers take what fits of an adapter and pass over the rest, and no field of adapter_config.json names
what a base model must have. But they refuse an adapter with rows for tokens of a module that the model lacks, and name
that module. So the adapter has such rows, none, of a module whose name says what to do; our loader leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flr.files import read_json, write_json

from .folder import ADAPTER_CONFIG, is_adapter

#: The field of adapter_config.json: ids, or ids by module, whose rows are the adapter's.
TOKENS = "trainable_token_indices"
#: Bytes of an adapter_config.json, which lists those ids.
LIMIT = 1 << 26
_MODULE = "flr: load this adapter by flr.from_pretrained (pip install flr)"


def mark(folder: Path, model: Any) -> None:
    """Mark the adapter of the patched ``model`` in ``folder``, if there is one."""
    if not is_adapter(folder):
        return
    config = read_json(folder / ADAPTER_CONFIG, LIMIT)
    given = config.get(TOKENS) or {}
    if isinstance(given, list):  # of the input embeddings
        table = model.get_input_embeddings()
        given = {next(name for name, module in model.named_modules() if module is table): given}
    write_json(folder / ADAPTER_CONFIG, {**config, TOKENS: {**given, _MODULE: []}})


def unmarked(given: Any) -> Any:
    """The value of that field without the mark: ids by module, ids, or None."""
    if not isinstance(given, dict):
        return given
    return {module: ids for module, ids in given.items() if module != _MODULE} or None
