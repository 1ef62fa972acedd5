"""Folders of PEFT adapters: what the base model is, and whether the adapter holds all that a patched model needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from flr.files import naming, read_json

from .folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weight_shapes

_PREFIX = "base_model.model."  # of names of weights that PEFT writes
_LIMIT = 1 << 22  # bytes of an adapter_config.json


def base_name(folder: Path) -> str:
    """The folder or the model on the Hub that the adapter in ``folder`` was trained on.

    Raises:
        ValueError: adapter_config.json names none, or the weights are not in safetensors.
    """
    name = read_json(folder / ADAPTER_CONFIG, _LIMIT).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: expected base_model_name_or_path, got {name!r}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"directory: expected {ADAPTER_WEIGHTS} in {folder}, found none")
    return name


def check_adapter(folder: Path, reasoner: nn.Module | None, rows: int, made: bool) -> None:
    """Refuse an adapter that leaves a part of the thought to chance.

    Args:
        folder: of the adapter.
        reasoner: that of the patched base model.
        rows: tokens that were added to the base model beside the thought, whose embeddings nothing else holds.
        made: the base model came without a reasoner, so that the adapter must hold all of it.

    Raises:
        ValueError: weights of the reasoner are missing, too many or of other shapes, or embeddings are missing.
    """
    shapes = weight_shapes([folder / ADAPTER_WEIGHTS], _PREFIX)
    saved = {name[len("flr.") :]: shape for name, shape in shapes.items() if name.startswith("flr.")}
    own = {} if reasoner is None else {name: tuple(value.shape) for name, value in reasoner.state_dict().items()}
    if saved != own and (saved or made):
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        wanted = "weights of the whole reasoner (modules_to_save=['flr'])"
        raise ValueError(f"directory: expected {wanted} in {folder / ADAPTER_WEIGHTS}, got others for {wrong}")
    if rows > 0 and not any("embed" in name or "wte" in name or "token_adapter" in name for name in shapes):
        wanted = f"embeddings of the {rows} tokens that were added to the base model"
        raise ValueError(f"directory: expected {wanted} in {folder / ADAPTER_WEIGHTS}, found none")


def adapts_thought(folder: Path) -> bool:
    """Whether the adapter in ``folder`` holds weights of a reasoner."""
    return bool(weight_shapes([folder / ADAPTER_WEIGHTS], f"{_PREFIX}flr."))


def wrap(model: Any, folder: Path, is_trainable: bool) -> Any:
    """``model`` as a ``PeftModel`` with the adapter in ``folder``."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"peft: expected the package peft, which reads the adapter in {folder}, got none") from error
    with naming(folder, "an adapter that fits its base model"):
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
