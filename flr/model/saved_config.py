"""config.json of a patched model: a model type of our own around the configuration of the model that it was.

Transformers reads a folder by its model type. Under the base model's own it would load that model and leave the thought
out, with a warning at most; under ours, which it does not know before ``import flr``, it stops, and the message shows
the type, so that is where the remedy stands. A class asked for by name (``LlamaForCausalLM.from_pretrained``) does not
look at the type, but at ``transformers_weights``, the name of the weights' file: no file's, it stops there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from flr.config import FLRConfig
from flr.files import atomic_file, read_json

from .adapter_mark import mark
from .folder import CONFIG

REMEDY = "pip install flr, then import flr"
#: What transformers shows where it does not know the type: "has model type `…` but Transformers does not recognize …".
MODEL_TYPE = f"flr ({REMEDY})"
ARCHITECTURE = "FLRForCausalLM"
_LIMIT = 1 << 24  # bytes of a config.json
_LONGEST = 600  # characters that an error says of what is in it


class SavedConfig(NamedTuple):
    """What config.json says: the model that was patched, and its thought."""

    base: PreTrainedConfig
    options: FLRConfig


def document(base: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model with configuration ``base`` and a thought with ``options``."""
    values = json.loads(base.to_json_string(use_diff=True))
    values.pop("flr", None)
    if (own := _own_ignored(base, values.pop("keys_to_ignore_at_inference", None))) is not None:
        values["keys_to_ignore_at_inference"] = own
    stop = {"transformers_weights": REMEDY}
    return {
        "architectures": [ARCHITECTURE],
        "base_config": {**values, **stop},
        "flr": options,
        "model_type": MODEL_TYPE,
        "transformers_version": values.get("transformers_version"),
        **stop,
    }


def write_config(path: str | Path, base: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Write :func:`document` to the file ``path``, formatted as transformers does."""
    with atomic_file(path) as temporary:
        content = json.dumps(document(base, options), indent=2, sort_keys=True) + "\n"
        temporary.write_text(content, encoding="utf-8")


def read_config(folder: Path) -> SavedConfig:
    """What config.json in ``folder`` says, of today's form or that of version 0.1.0 (the base model's, with ``flr``).

    Raises:
        OSError: there is no config.json.
        ValueError: it is not that of a patched model, or is of a model type that transformers does not know.
    """
    file = folder / CONFIG
    values = _values(folder)
    if not is_patched_config(values):
        raise ValueError(f"directory: expected a patched model's {CONFIG} with the key 'flr' in {folder}, got another")
    if values.get("model_type") == MODEL_TYPE:
        return SavedConfig(base_config(values.get("base_config"), f"{file}: base_config"), _options(file, values))
    options = _options(file, values)
    ignored = values.pop("keys_to_ignore_at_inference", None)
    del values["flr"]
    base = base_config(values, str(file))
    if (own := _own_ignored(base, ignored)) is not None:
        base.keys_to_ignore_at_inference = own
    return SavedConfig(base, options)


def _own_ignored(base: PreTrainedConfig, saved: Any) -> list[str] | None:
    """What of ``keys_to_ignore_at_inference`` the configuration had of its own, None for its class's."""
    own = [key for key in saved or [] if key != "flr"]
    return None if saved is None or own == list(getattr(type(base), "keys_to_ignore_at_inference", None) or []) else own


def base_config(values: Any, name: str) -> PreTrainedConfig:
    """The configuration that ``values`` of a JSON file describe: of a model type that comes with transformers.

    Raises:
        ValueError: it does not; ``name`` stands at the head of the message.
    """
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str) or model_type == MODEL_TYPE:
        raise ValueError(f"{name}: expected the configuration of a causal LM with its model_type, got {model_type!r}")
    own = {key: value for key, value in values.items() if key not in ("model_type", "transformers_weights")}
    from transformers import AutoConfig  # at whose import this module must be whole: flr/__init__.py registers by it

    # its own writing of infinities, which it undoes when it reads a file
    own = getattr(PreTrainedConfig, "_decode_special_floats", lambda x: x)(own)
    try:
        return AutoConfig.for_model(model_type, **own)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise ValueError(f"{name}: expected a configuration of {model_type}, got {_short(error)}") from error
        wanted = "a model type that comes with transformers (code in a folder is never run)"
        raise ValueError(f"{name}: expected {wanted}, got {model_type!r}") from None
    except (TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{name}: expected a configuration of {model_type}, got {_short(error)}") from error


def _short(error: Exception) -> str:
    """What an error says, in one line of bounded length: a file may hold any text."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def is_patched_config(values: dict[str, Any]) -> bool:
    """Whether a config.json of this content is that of a patched model."""
    return "flr" in values or values.get("model_type") == MODEL_TYPE


def holds_patched_model(folder: Path) -> bool:
    """Whether config.json in ``folder`` is that of a patched model; OSError where there is none."""
    return is_patched_config(_values(folder))


def _values(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise OSError(f"directory: expected a folder with {CONFIG}, got {folder}")
    return read_json(folder / CONFIG, _LIMIT)


def _options(file: Path, values: dict[str, Any]) -> FLRConfig:
    options = values.get("flr")
    if not isinstance(options, dict):
        raise ValueError(f"{file}: flr: expected an object, got {type(options).__name__}")
    try:
        return FLRConfig.from_dict(options)
    except (TypeError, ValueError) as error:  # a number where text belongs fails at its first comparison
        raise ValueError(f"{file}: flr: {_short(error)}") from error


def flr_save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """``save_pretrained`` as it was, but for config.json, which is written in our form from the start.

    The model keeps its configuration throughout; for as long as the save takes, that one writes its file our way. So no
    moment has the base model's config.json beside weights with a thought, and an upload at the end takes ours.
    """
    config: PreTrainedConfig = self.config

    def to_json_file(path: Any, use_diff: bool = True) -> None:
        config.__dict__.pop("to_json_file", None)  # else it would be written as an attribute
        write_config(path, config, config.flr)

    config.__dict__["to_json_file"] = to_json_file
    try:
        self._flr_patch.original(self, "save_pretrained")(save_directory, *args, **kwargs)
        if getattr(self, "_hf_peft_config_loaded", False) and kwargs.get("is_main_process", True):
            to_json_file(Path(save_directory) / CONFIG)  # beside an adapter, where transformers writes none
            mark(Path(save_directory), self)
    finally:
        config.__dict__.pop("to_json_file", None)
