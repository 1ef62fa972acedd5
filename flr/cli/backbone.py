"""The model that is trained: a pretrained one, one that flr trained before, or a small one from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import COUNT, MOST_FACTORS, NOT_NEGATIVE, POSITIVE, SHARE, FLRConfig, Numbers, check_beside, option

from . import voice
from .errors import did_you_mean
from .options import DataOptions, check_as_saved, check_option, load_trained
from .parsing import REVISION
from .weights import LoraOptions, WeightOptions

if TYPE_CHECKING:  # a command's --help waits for none of these
    import numpy as np

    from flr.data import RecDataset, RecProcessor

SCRATCH_INITS, PRETRAINED_INITS = ("random", "title"), ("text", "mean")
INITS = (*SCRATCH_INITS, *PRETRAINED_INITS)
_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "attention_dropout",
    "initializer_range", "tie_word_embeddings",
)  # fmt: skip
#: Causal LMs whose configuration says ``is_decoder=False`` all the same; elsewhere that is an encoder.
_CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


@dataclass
class ModelOptions(LoraOptions, WeightOptions):
    """The backbone: a pretrained causal LM, or a small one from scratch."""

    model: str | None = option(
        None,
        "Pretrained causal LM, a folder or an id on the Hub; one that flr trained goes on with its thought and its "
        "prompts. Default: from scratch, by the options below.",
    )
    revision: str | None = option(None, REVISION)
    gguf_file: str | None = option(None, "Name of the GGUF file among the model's, where one holds its weights.")
    freeze_backbone: bool = option(False, "Train the reasoner alone.")
    factors_from_groups: bool = option(
        False,
        "As many factors as there are groups of items that occur together in the training rows, each of which begins "
        "by looking for one of them; num_factors, as without, where there are none.",
    )
    init_items: str | None = option(
        None,
        "What embeddings of new tokens (items, codes) start from. Pretrained: text, the mean of the tokens of their "
        "titles (default), or mean, that of all tokens. From scratch: random (default) or title, features of words.",
    )
    architecture: str = option("llama", "From scratch: model type, e.g. llama, qwen2, gpt2.")
    hidden_size: int = option(128, "From scratch: D.")
    intermediate_size: int = option(256, "From scratch: size of the feed-forward layer.")
    num_hidden_layers: int = option(1, "From scratch: layers.")
    num_attention_heads: int = option(4, "From scratch: attention heads.")
    attention_dropout: float = option(0.0, "From scratch: dropout on attention weights.")
    tie_word_embeddings: bool = option(True, "From scratch: one table for input and output.")
    initializer_range: float = option(0.02, "From scratch: standard deviation of initial weights.")
    embedding_scale: float | None = option(None, "From scratch: RMS of item embeddings. Default: initializer_range.")
    title_power: float = option(0.5, "init_items title: weight of words that many titles share, see item_features.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        **LoraOptions.numbers,
        "hidden_size": COUNT,
        "intermediate_size": COUNT,
        "num_hidden_layers": COUNT,
        "num_attention_heads": COUNT,
        "attention_dropout": SHARE,
        "initializer_range": POSITIVE,
        "embedding_scale": POSITIVE.or_none,
        "title_power": NOT_NEGATIVE,
    }

    def __post_init__(self) -> None:
        WeightOptions.__post_init__(self)
        LoraOptions.__post_init__(self)
        check_option(self, f"one of {', '.join(INITS)}", self.init_items in (None, *INITS), "init_items")
        inits = SCRATCH_INITS if self.model is None else PRETRAINED_INITS
        where = "from scratch" if self.model is None else "with a model"
        check_option(self, f"{' or '.join(inits)} {where}", self.init_items in (None, *inits), "init_items")
        if self.model is None:
            for name in ("lora_rank", "load_in_4bit", "gguf_file"):
                check_option(self, "a pretrained --model beside it", not getattr(self, name), name)
            check_option(self, "float32 for a model from scratch", self.dtype in ("auto", "float32"), "dtype")
        needed = ("init_items title", self.init_items == "title")
        check_beside(self, dict.fromkeys(("embedding_scale", "title_power"), needed))
        check_beside(self, {"revision": ("a model on the Hub", self.model is not None)})
        if self.gguf_file is not None:
            from flr.model.gguf import check_name

            check_name(self.gguf_file)
        if self.load_in_4bit and self.gguf_file:
            raise ValueError(f"load_in_4bit: expected a model in safetensors, got {self.gguf_file!r}")
        check_option(self, "False beside lora_rank, which does it", not (self.freeze_backbone and self.lora_rank),
                     "freeze_backbone")  # fmt: skip

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone's own weights are trained."""
        return not (self.lora_rank or self.freeze_backbone)

    def build(
        self, data: DataOptions, config: FLRConfig, dataset: RecDataset, seed: int, use_cpu: bool = False
    ) -> tuple[Any, RecProcessor]:
        """A patched model, with adapters where they are asked for, and its processor."""
        import torch

        from flr.data import PromptTemplate, RecProcessor, build_tokenizer
        from flr.data.saved_tokenizer import load_tokenizer
        from flr.model.checkpoint import holds_thought
        from flr.model.folder import local_folder
        from flr.model.patch import patch_model
        from flr.train import init_factors, init_item_embeddings, init_new_tokens

        torch.manual_seed(seed)
        tokenizer: Any
        folder = None if self.model is None else local_folder(self.model, None, self.gguf_file, revision=self.revision)
        if folder is None:
            tokenizer = build_tokenizer(dataset.catalogue, data.codec, vocab_size=data.vocab_size)
        elif self.gguf_file is None and holds_thought(folder):
            return self._continued(folder, data, config, dataset, use_cpu)
        else:
            loading = self._loading(folder, use_cpu)
            tokenizer = load_tokenizer(folder, gguf_file=self.gguf_file)
        group = self._groups(config, dataset)
        if group is not None:
            config = dataclasses.replace(config, num_factors=int(group.max()) + 1)
        known = len(tokenizer)
        processor = RecProcessor(
            tokenizer,
            dataset.catalogue,
            data.codec,
            None if data.template is None else PromptTemplate(data.template),
            data.max_history,
            config.thought_count,
            thought_token=config.thought_token,
            max_prompt_tokens=data.max_prompt_tokens,
            max_title_tokens=data.max_title_tokens,
            views=data.views(),
        )
        if folder is None:
            model = self._scratch(tokenizer)
            if self.init_items == "title":
                init_item_embeddings(model, processor, seed, self.embedding_scale, self.title_power)
        else:
            model = self._pretrained(folder, tokenizer, loading)
            self._check_shape(model.config)
            for notice in init_new_tokens(model, processor, known, self.init_items or "text"):
                voice.note(notice)
        model = patch_model(model, tokenizer, config)
        if group is not None and config.variant == "flr":
            init_factors(model, processor, dataset.train, group)
        return self._chosen(model, processor), processor

    def _loading(self, folder: Path, use_cpu: bool, adapted: bool = False) -> dict[str, Any]:
        """Arguments of the loader of a pretrained model."""
        from flr.model.gguf import gguf_arguments

        if self.load_in_4bit and not (self.lora_rank or adapted):
            raise ValueError("load_in_4bit: expected a lora_rank beside it, since packed weights are not trained")
        loading = {**self.to_train(self.trains_backbone and not adapted, use_cpu), **self.quantised(use_cpu)}
        return loading if self.gguf_file is None else {**loading, **gguf_arguments(folder, self.gguf_file)}

    def _chosen(self, model: Any, processor: RecProcessor) -> Any:
        """``model`` with those weights trained that the options say."""
        from flr.train.lora import add_lora, own_tokens

        settings = self.lora()
        if settings is not None:
            assert self.model is not None
            place = Path(self.model)
            source = str(place.absolute()) if place.is_dir() else self.model
            return add_lora(model, settings, own_tokens(processor), source, self.revision)
        if self.freeze_backbone:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".flr." in f".{name}")
        return model

    def _groups(self, config: FLRConfig, dataset: RecDataset) -> np.ndarray | None:
        """The group of every item (-1: none), 16 at most, where that is asked for and items fall into groups."""
        import numpy as np

        from flr.data import interest_groups

        if not self.factors_from_groups or config.variant not in ("flr", "offsets"):
            return None
        found = interest_groups(dataset.train, len(dataset.catalogue))
        if not found.tell_apart:
            voice.note(
                f"num_factors: {config.num_factors}, as without factors_from_groups, since the items do not fall into "
                "groups of which each occurs apart from the others."
            )
            return None
        number = min(found.count, MOST_FACTORS)
        voice.note(
            f"num_factors: {number}, as many as groups of items that occur together; they have {found.covered:.0%} of "
            "the items."
        )
        return np.where(found.group < number, found.group, -1)

    def _continued(
        self, folder: Path, data: DataOptions, config: FLRConfig, dataset: RecDataset, use_cpu: bool
    ) -> tuple[Any, RecProcessor]:
        """A model that was trained before, with its thought, prompts and views; options that say otherwise are refused.

        An option that has its default is taken for not given: views alone are changed by giving others.
        """
        from flr.model.backbone import causal_lm
        from flr.model.folder import is_adapter
        from flr.train.precision import raise_trained

        assert self.model is not None
        adapted = is_adapter(folder)
        if adapted and self.lora_rank:
            wanted = (
                f"0, since {self.model} is an adapter, which is trained further; flr merge makes a whole model of it"
            )
            raise ValueError(f"lora_rank: expected {wanted}, got {self.lora_rank}")
        if self.factors_from_groups:
            raise ValueError(
                f"factors_from_groups: expected False with {self.model}, whose thought has its factors, got True"
            )
        if self.init_items is not None:
            raise ValueError(
                f"init_items: expected nothing with {self.model}, whose items it knows, got {self.init_items!r}"
            )
        loading = self._loading(folder, use_cpu, adapted)
        model, processor = load_trained(self.model, dataset, self.revision, True, data, **loading)
        self._check_shape(causal_lm(model).config)
        thought = causal_lm(model)._flr_patch.config.to_dict()
        check_as_saved(self.model, thought, config.to_dict(), FLRConfig().to_dict())
        processor.views = data.views(processor.views)
        return raise_trained(self._chosen(model, processor)) if adapted else self._chosen(model, processor), processor

    def _check_shape(self, config: Any) -> None:
        """ValueError that names an option of models from scratch which says otherwise than the one that was loaded."""
        shape = {name: getattr(config, name) for name in _SHAPE if hasattr(config, name)}
        default = {field.name: field.default for field in dataclasses.fields(self)}
        check_as_saved(str(self.model), {"architecture": config.model_type, **shape}, vars(self), default)

    def _scratch(self, tokenizer: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

        if self.architecture not in CAUSAL:
            expected = "the model type of a causal LM, such as llama, qwen2 or gpt2"
            hint = did_you_mean(self.architecture, CAUSAL)
            raise ValueError(f"architecture: expected {expected}, got {self.architecture!r}{hint}")
        shape = {name: getattr(self, name) for name in _SHAPE}
        shape |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape["vocab_size"] = len(tokenizer)
        if self.architecture == "gpt2":
            shape |= {"n_inner": shape.pop("intermediate_size"), "attn_pdrop": shape.pop("attention_dropout")}
        elif self.architecture in ("llama", "qwen2", "qwen3", "mistral"):
            shape["num_key_value_heads"] = self.num_attention_heads
        from flr.model.attention import check_attention

        check_attention(self.attn_implementation)
        try:
            config = AutoConfig.for_model(self.architecture, **shape)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **self.attention())
        except Exception as error:  # every family has checks, and kinds of errors, of its own
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            reason = " ".join(str(error).split())
            expected = f"sizes that {self.architecture} can be built with"
            raise ValueError(f"architecture: expected {expected}, got {sizes}: {reason}") from error
        return check_causal(model, "architecture", self.architecture)

    def _pretrained(self, folder: Path, tokenizer: Any, loading: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        from flr.model.attention import check_attention
        from flr.model.gguf import GGUF_KEY, unpacked

        check_attention(self.attn_implementation)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **loading
        )
        if self.gguf_file is not None:
            unpacked(model)
            if self.lora_rank:  # an adapter is saved without it, and says where it is
                setattr(model.config, GGUF_KEY, self.gguf_file)
        model.name_or_path = model.config.name_or_path = str(self.model)  # not the place in the Hub's cache
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return check_causal(model, "model", str(self.model))


def check_causal(model: Any, name: str, value: str) -> Any:
    """``model``; ValueError for an encoder, whose tokens see the ones after them."""
    kind = model.config.model_type
    if getattr(model.config, "is_decoder", None) is False and kind not in _CAUSAL_ANYWAY:
        raise ValueError(f"{name}: expected a causal LM, got {value}, an encoder or encoder-decoder ({kind})")
    return model
