"""Files of a saved model, in a folder or on the Hub: found in transformers' order, and read within bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flr.files import read_json

if TYPE_CHECKING:  # this is read while transformers is imported, which need not wait for torch
    from torch import Tensor

PathLike = str | os.PathLike[str]

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: Files of a model and its processor, of any form that transformers writes.
MODEL_FILES = (
    "model*.safetensors", "model*.safetensors.index.json", "adapter_model*.safetensors", "adapter_config.json",
    "config.json", "generation_config.json", "processor_config.json", "catalogue.parquet", "item_tokens.safetensors",
    "item_knn.safetensors",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

#: What ``flr update`` writes beside a model: of which rows, and why it was kept.
UPDATE_NAME = "flr_update.json"

#: Keyword arguments of transformers' loaders that say where on the Hub a model is looked for.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

BESIDE = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "catalogue.parquet",
    "item_tokens.safetensors",
    "item_knn.safetensors",
    ADAPTER_WEIGHTS,
)  # what goes with the weights


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is that of an adapter (PEFT), and not of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def local_folder(name: PathLike, variant: str | None = None, gguf_file: str | None = None, **hub: Any) -> Path:
    """The folder ``name``, or the files of the model ``name`` on the Hub, downloaded into its cache.

    A folder on this machine goes before a model of that name, as in transformers; a ``Path`` is always a folder. Of a
    model's files only those are fetched that this package reads: JSON, tokenizer, catalogue, safetensors weights.

    Args:
        name: a folder, or ``"user/name"``.
        variant: of the weights' file names, ``model.VARIANT.safetensors``.
        gguf_file: the file that holds the weights instead.
        hub: of :data:`HUB_OPTIONS`, as for ``huggingface_hub.snapshot_download``.

    Raises:
        OSError: no such folder, and no such model that can be reached.
        ValueError: a variant that is no part of a file name.
    """
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(f"variant: expected a part of a file name, got {variant!r}")
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        if not isinstance(name, str) or name.startswith((".", "~")):
            raise HFValidationError("this is a path")
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(f"directory: expected a folder with {CONFIG} or a model on the Hub, got {folder}") from None
    weights = [f"model.{variant}*.safetensors"] if variant else [WEIGHTS, "model-*.safetensors"]
    weights = weights if gguf_file is None else [gguf_file]
    try:
        found = snapshot_download(name, allow_patterns=[*BESIDE, *weights], ignore_patterns=["*/*"], **hub)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        wanted = f"a folder with {CONFIG} or a model on the Hub"
        raise OSError(f"directory: expected {wanted}, got {name!r}: no folder, and {reason}") from error
    return Path(found)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model, in transformers' order: one whole file goes before an index.

    Raises:
        ValueError: neither is there, or the index is none, or names files outside the folder or missing ones.
    """
    infix = f".{variant}" if variant else ""
    single = folder / WEIGHTS.replace(".safetensors", f"{infix}.safetensors")
    if single.is_file():
        return [single]
    index = folder / INDEX.replace(".json", f"{infix}.json")
    if not index.is_file():
        raise ValueError(f"directory: expected {single.name} or its index in {folder}, found neither")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: expected a weight_map from weights to files, got {type(files).__name__}")
    names = sorted(set(files.values()))
    for name in names:
        # the cache of the Hub links its files, so that where a link leads says nothing: names decide
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(f"{index}: expected safetensors files of the same folder, got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: expected {name} beside it, found none")
    return [folder / name for name in names]


def weight_shapes(files: Sequence[Path], prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in ``files`` whose name starts with ``prefix``, by the rest of their name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
            shapes |= {name[len(prefix) :]: tuple(weights.get_slice(name).get_shape()) for name in names}
    return shapes


def read_weights(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
    """The weights in ``files`` whose name starts with ``prefix``, by the rest of their name."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors |= {name[len(prefix) :]: weights.get_tensor(name) for name in names}
    return tensors


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from error
