"""Loading patched models: ours, and LatentR3's checkpoints. Of a folder it reads safetensors and JSON.

A run of training also leaves PyTorch's pickles in its ``checkpoint-*`` folders (optimiser, generators); nothing here
opens them.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flr.config import FLRConfig

from .patch import patch_model

logger = logging.getLogger("flr")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    raise ValueError(f"directory: expected model.safetensors or its index in {directory}, found neither")


def _read(directory: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors whose name starts with ``prefix``, without it."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors.update({name[len(prefix) :]: weights.get_tensor(name) for name in names})
    return tensors


class _Quiet(logging.Filter):
    """Drops the loading report about keys that this module loads itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "UNEXPECTED" not in record.getMessage() and "not used when initializing" not in record.getMessage()


def _load_backbone(directory: Path, prefix: str, **kwargs: Any) -> Any:
    """The causal LM in ``directory``; raises unless the only unexpected ones among its weights are ``prefix``'s."""
    reports = logging.getLogger("transformers.modeling_utils")
    quiet = _Quiet()
    reports.addFilter(quiet)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, use_safetensors=True, **kwargs
        )
    finally:
        reports.removeFilter(quiet)
    model, info = loaded
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(prefix)]
    for name, keys in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"directory: expected a whole model in {directory}, got {len(keys)} {name} weights, e.g. {min(keys)!r}"
            )
    return model


def from_pretrained(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a patched model that ``model.save_pretrained(directory)`` wrote.

    Args:
        directory: holds config.json (with the key ``flr``) and safetensors weights.
        kwargs: as for ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, attn_implementation …).

    Returns:
        The model, patched, in evaluation mode.

    Raises:
        ValueError: no ``flr`` section in the config, or weights missing or unexpected.
        OSError: no such directory.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise OSError(f"directory: expected a folder with config.json, got {directory}")
    options = getattr(AutoConfig.from_pretrained(directory), "flr", None)
    if options is None:
        raise ValueError(f"directory: expected a patched model's config.json with the key 'flr' in {directory}")
    model = _load_backbone(directory, "flr.", **kwargs)
    patch_model(model, config=FLRConfig.from_dict(options), verify=False)
    if hasattr(model, "flr"):
        _load_strictly(model.flr, _read(directory, "flr."), directory)
    return model.eval()


def load_latentr3(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a LatentR3 checkpoint: a causal LM's state dict plus ``attention.{query,key,value}.{weight,bias}``.

    The thought token is the last row of the embedding, as its code assumes.

    Raises:
        ValueError: the attention's weights are missing or of the wrong shape, or other weights do not fit.
    """
    directory = Path(directory)
    attention = _read(directory, "attention.")
    if not attention:
        raise ValueError(f"directory: expected weights attention.query.weight … in {directory}, found none")
    model = _load_backbone(directory, "attention.", **kwargs)
    last = model.get_input_embeddings().weight.shape[0] - 1
    patch_model(model, config=FLRConfig(variant="latentr3", thought_token_id=last), verify=False)
    _load_strictly(model.flr, attention, directory)
    return model.eval()


def _load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"directory: expected weights that fit the reasoner in {directory}, got {error}") from error
