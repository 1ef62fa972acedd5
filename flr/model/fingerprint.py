"""Whether two folders hold the same model: one digest of all that is read when it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flr.files import sha256

from .adapter import base_name, base_revision
from .folder import INDEX, MODEL_FILES, WEIGHTS, PathLike, is_adapter, local_folder

#: What MODEL_FILES does not name: tokenizers and weights in forms that only others write.
_OTHERS = ("*.tiktoken", "*.model", "*.safetensors", "*.gguf")


def model_fingerprint(directory: PathLike, **hub: Any) -> str:
    """SHA-256 of a saved model, in hexadecimal: names and contents of its files, and of its base model's.

    Counted are weights, configuration, tokenizer, catalogue and item tokens, wherever the folder lies; a model card,
    checkpoints and what else stands beside them are not.

    Args:
        directory: a folder, or ``"user/name"`` on the Hub.
        hub: of :data:`flr.model.folder.HUB_OPTIONS`.

    Raises:
        OSError: no such folder or model, an adapter's base model included.
    """
    folder = local_folder(directory, **hub)
    digest = _of_folder(folder)
    if is_adapter(folder) and not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        base = model_fingerprint(base_name(folder), **{**hub, "revision": base_revision(folder)})
        digest.update(f"base {base}\n".encode())
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """As :func:`model_fingerprint`, without the base model that an adapter names."""
    return _of_folder(folder).hexdigest()


def _of_folder(folder: Path) -> Any:
    found = {path for form in (*MODEL_FILES, *_OTHERS) for path in folder.glob(form) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(found, key=lambda path: path.name):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest
