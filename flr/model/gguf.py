"""Base models in GGUF files: read by transformers into ordinary float weights, whatever the file packs them in."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

#: Of a configuration: the GGUF file in the base model's folder that an adapter was trained on.
GGUF_KEY = "gguf_file"


def check_name(name: Any, label: str = "gguf_file") -> str:
    """``name``, the name of a GGUF file without folders; ValueError otherwise."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.gguf", name):
        raise ValueError(f"{label}: expected the name of a .gguf file in the model's folder, got {name!r}")
    return name


def gguf_arguments(folder: Path, name: str) -> dict[str, Any]:
    """Arguments of ``AutoModelForCausalLM.from_pretrained`` that read ``name`` in ``folder`` as float weights.

    Raises:
        ValueError: no such file, or the package gguf is missing.
    """
    if not (folder / check_name(name)).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))[:8]) or "none"
        raise ValueError(f"gguf_file: expected a .gguf file in {folder}, got {name!r}; there: {found}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"gguf_file: expected the package gguf, which reads {name}, got none; pip install 'flr[gguf]'")
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {"gguf_file": name, **({} if kind is None else {"quantization_config": kind(dequantize=True)})}


def unpacked(model: Any) -> Any:
    """``model`` without the note that it came quantised: its weights are not."""
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
