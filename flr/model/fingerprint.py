"""Whether two folders hold the same model: one digest of all that is read when it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flr.files import sha256

from .adapter import base_name, base_revision
from .folder import BESIDE, INDEX, UPDATE_NAME, WEIGHTS, PathLike, is_adapter, local_folder

_NOT_READ = (
    "trainer_state.json",
    "flr_run.json",
    "manifest.json",
    UPDATE_NAME,
)  # of a training run, whose folder is the model's, too


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
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    if is_adapter(folder) and not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        base = model_fingerprint(base_name(folder), **{**hub, "revision": base_revision(folder)})
        digest.update(f"base {base}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    patterns = (*BESIDE, "*.safetensors", "*.gguf")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted((path for path in found if path.name not in _NOT_READ), key=lambda path: path.name)
