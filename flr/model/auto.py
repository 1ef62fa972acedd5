"""Our model type in transformers' Auto classes and pipelines: with ``flr`` imported they give the patched model.

Both are told while transformers is imported, when most of it is half there: models are imported by the methods that
make them.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from flr.config import FLRConfig

from .folder import HUB_OPTIONS, is_adapter, local_folder
from .saved_config import MODEL_TYPE, SavedConfig, document
from .saved_config import base_config as config_of


class FLRModelConfig(PreTrainedConfig):
    """config.json of a patched model, as ``AutoConfig`` gives it: ``base_config`` is the patched model's.

    A loaded model's own ``config`` is the base model's, with the thought's options as ``config.flr``.

    Args:
        base_config: a configuration, or its values with their ``model_type``.
        flr: options of :class:`flr.FLRConfig`.
        kwargs: as for ``PreTrainedConfig``.
    """

    model_type = MODEL_TYPE
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012 - so transformers has it

    def __init__(self, base_config: Any = None, flr: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # first: what is set on this configuration (attn_implementation …) reaches the inner one if it is there
        self.base_config = config_of(base_config, "base_config") if isinstance(base_config, dict) else base_config
        self.flr = FLRConfig.from_dict(flr or {}).to_dict()
        kwargs.pop("transformers_weights", None)
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, which has the sizes."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json, the same that the model's ``save_pretrained`` writes."""
        return super().to_diff_dict() if self.base_config is None else document(self.base_config, self.flr)


class FLRForCausalLM:
    """What ``AutoModelForCausalLM`` turns to for our model type; it gives the base model's class, patched."""

    config_class = FLRModelConfig

    @classmethod
    def from_pretrained(
        cls, directory: Any, *_: Any, config: Any = None, variant: str | None = None, **kwargs: Any
    ) -> Any:
        """As :func:`flr.from_pretrained`, with the configuration that the caller read and may have changed."""
        from .checkpoint import from_pretrained, load_saved

        for name in ("_from_auto", "_from_pipeline", "adapter_kwargs"):  # between transformers' own classes
            kwargs.pop(name, None)
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if kwargs.get(name) is not None}
        folder = local_folder(directory, variant, **hub)
        if config is None or is_adapter(folder):
            return from_pretrained(str(directory), variant=variant, **hub, **kwargs)
        saved = SavedConfig(config.base_config, FLRConfig.from_dict(config.flr))
        return load_saved(folder, saved, variant, **kwargs)

    @classmethod
    def _from_config(cls, config: FLRModelConfig, **kwargs: Any) -> Any:
        """New weights: the base model of this configuration, patched."""
        from transformers import AutoModelForCausalLM

        from .patch import patch_model

        if config.base_config is None:
            raise ValueError("base_config: expected the configuration of a causal LM, got None")
        model = AutoModelForCausalLM.from_config(config.base_config, trust_remote_code=False, **kwargs)
        return patch_model(model, config=FLRConfig.from_dict(config.flr))


def register_config(module: Any) -> None:
    """Tell ``AutoConfig`` of ``module``, transformers' ``configuration_auto``, of our type; again changes nothing."""
    module.AutoConfig.register(MODEL_TYPE, FLRModelConfig, exist_ok=True)


def register_model(module: Any) -> None:
    """Tell ``AutoModelForCausalLM`` of ``module``, transformers' ``modeling_auto``, of it; again changes nothing."""
    module.AutoModelForCausalLM.register(FLRModelConfig, FLRForCausalLM, exist_ok=True)
