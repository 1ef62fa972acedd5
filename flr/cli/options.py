"""Options that commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flr.config import FLRConfig, option

from .errors import did_you_mean
from .parsing import REVISION

if TYPE_CHECKING:  # a command's --help waits for none of these
    from flr.data import Augment, HistoryViews, Interactions, RecDataset, RecProcessor

INITS = ("random", "title")
_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "attention_dropout",
    "initializer_range", "tie_word_embeddings",
)  # fmt: skip
#: Causal LMs whose configuration says ``is_decoder=False`` all the same; elsewhere that is an encoder.
_CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


def _check(options: Any, expected: str, ok: bool, name: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {getattr(options, name)!r}")


@dataclass
class DataOptions:
    """What to learn from."""

    data: str = option("planted", "Folder or file of interactions, or 'planted' for generated data.")
    data_format: str = option("auto", "auto, prepared, or a kind of flr prepare: csv, recbole, parquet, movielens, …")
    codec: str = option("id", "How an item is written: title, sid or id.")
    template: str | None = option(None, "Prompt text with the placeholder {history}. Default: by codec.")
    max_history: int = option(10, "Latest items of a history that enter the prompt.")
    max_prompt_tokens: int | None = option(
        None,
        "Tokens of a prompt; earlier items are left out. Default: what the model has positions for.",
    )
    views_weight: float | None = option(
        None, "Weight of one-item views in the answer, 0..1 (see flr.decode.mixture). Default: none, or as saved."
    )
    views_decay: float = option(0.6, "Views: weight of an item relative to the next later one.")
    max_title_tokens: int | None = option(None, "Codec title: tokens kept of a title.")
    vocab_size: int = option(8192, "Codec title: size of the tokenizer trained from scratch.")
    planted_items: int = option(500, "Generated data: items.")
    planted_users: int = option(2000, "Generated data: users.")

    def views(self) -> HistoryViews | None:
        from flr.data import HistoryViews

        return None if self.views_weight is None else HistoryViews(self.views_weight, self.views_decay)

    def load(self) -> RecDataset:
        from flr.data import load_dataset, planted_dataset

        if self.data == "planted":
            return planted_dataset(num_items=self.planted_items, num_users=self.planted_users)
        return load_dataset(self.data, self.data_format)


@dataclass
class AugmentOptions:
    """How training histories are varied."""

    expand_prefixes: bool = option(False, "Train on every prefix of a history too.")
    augment_prefix: float = option(0.0, "Probability that a row is cut at a random place.")
    augment_suffix: float = option(0.0, "Probability that only a random number of the latest items is kept.")
    augment_drop_item: float = option(0.0, "Probability that an item of a history is left out.")
    augment_shuffle: float = option(0.0, "Probability that a history is shuffled locally.")
    augment_single: float = option(0.0, "Probability that a history is reduced to one of its items.")
    augment_neighbour: float = option(0.0, "Probability that the target is drawn from an item's neighbours instead.")
    catalogue_rows: int = option(0, "Rows added for every item of the catalogue: the item, then a drawn neighbour.")
    neighbour_content: float = option(1.0, "Neighbours: weight of title similarity beside co-occurrence.")
    neighbour_temperature: float = option(1.0, "Neighbours: below 1 sharpens.")

    def __post_init__(self) -> None:
        _check(self, "an integer >= 0", self.catalogue_rows >= 0, "catalogue_rows")
        _check(self, "a positive number", self.neighbour_temperature > 0, "neighbour_temperature")
        _check(self, "a number >= 0", self.neighbour_content >= 0, "neighbour_content")

    def apply(self, dataset: RecDataset, max_history: int) -> tuple[Interactions, Augment]:
        """Training rows, and how to vary them."""
        from flr.data import Augment
        from flr.data import expand_prefixes as all_prefixes
        from flr.train import item_neighbours, with_catalogue_rows

        options = [f.name for f in dataclasses.fields(self) if f.name.startswith("augment_")]
        chances = {name.removeprefix("augment_"): getattr(self, name) for name in options}
        rows = all_prefixes(dataset.train, max_history=max_history) if self.expand_prefixes else dataset.train
        table = None
        if self.augment_neighbour or self.catalogue_rows:
            content, temperature = self.neighbour_content, self.neighbour_temperature
            table = item_neighbours(dataset.train, dataset.catalogue, content=content, temperature=temperature)
            rows = with_catalogue_rows(rows, table, self.catalogue_rows)
        return rows, Augment(**chances, neighbours=table)


@dataclass
class ModelOptions:
    """The backbone: a pretrained causal LM, or a small one from scratch."""

    model: str | None = option(
        None,
        "Pretrained causal LM, a folder or an id on the Hub; one that flr trained goes on with its thought and its "
        "prompts. Default: from scratch, by the options below.",
    )
    revision: str | None = option(None, REVISION)
    architecture: str = option("llama", "From scratch: model type, e.g. llama, qwen2, gpt2.")
    hidden_size: int = option(128, "From scratch: D.")
    intermediate_size: int = option(256, "From scratch: size of the feed-forward layer.")
    num_hidden_layers: int = option(1, "From scratch: layers.")
    num_attention_heads: int = option(4, "From scratch: attention heads.")
    attention_dropout: float = option(0.0, "From scratch: dropout on attention weights.")
    tie_word_embeddings: bool = option(True, "From scratch: one table for input and output.")
    initializer_range: float = option(0.02, "From scratch: standard deviation of initial weights.")
    embedding_scale: float | None = option(None, "From scratch: RMS of item embeddings. Default: initializer_range.")
    init_items: str = option("random", f"From scratch: item embeddings, one of {', '.join(INITS)}.")
    title_power: float = option(0.5, "init_items title: weight of words that many titles share, see item_features.")
    freeze_backbone: bool = option(False, "Train the reasoner alone.")

    def __post_init__(self) -> None:
        _check(self, f"one of {', '.join(INITS)}", self.init_items in INITS, "init_items")
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _check(self, "an integer >= 1", getattr(self, name) >= 1, name)
        _check(self, "a number in [0, 1)", 0 <= self.attention_dropout < 1, "attention_dropout")
        _check(self, "a positive number", self.initializer_range > 0, "initializer_range")
        _check(self, "a positive number", self.embedding_scale is None or self.embedding_scale > 0, "embedding_scale")
        _check(self, "a number >= 0", self.title_power >= 0, "title_power")

    def build(self, data: DataOptions, config: FLRConfig, dataset: RecDataset, seed: int) -> tuple[Any, RecProcessor]:
        """A patched model and its processor."""
        import torch

        from flr.data import PromptTemplate, RecProcessor, build_tokenizer
        from flr.data.saved_tokenizer import load_tokenizer
        from flr.model.checkpoint import holds_thought
        from flr.model.folder import local_folder
        from flr.model.patch import patch_model
        from flr.train import init_item_embeddings

        torch.manual_seed(seed)
        tokenizer: Any
        folder = None if self.model is None else local_folder(self.model, revision=self.revision)
        if folder is not None and holds_thought(folder):
            return self._continued(data, config, dataset)
        if folder is None:
            tokenizer = build_tokenizer(dataset.catalogue, data.codec, vocab_size=data.vocab_size)
        else:
            tokenizer = load_tokenizer(folder)
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
        model = self._scratch(tokenizer) if folder is None else self._pretrained(folder, tokenizer)
        if folder is None and self.init_items == "title":
            init_item_embeddings(model, processor, seed, self.embedding_scale, self.title_power)
        return self._frozen(patch_model(model, tokenizer, config)), processor

    def _frozen(self, model: Any) -> Any:
        if self.freeze_backbone:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".flr." in f".{name}")
        return model

    def _continued(self, data: DataOptions, config: FLRConfig, dataset: RecDataset) -> tuple[Any, RecProcessor]:
        """A model that was trained before, with its thought, prompts and views; options that say otherwise are refused.

        An option that has its default is taken for not given: views alone are changed by giving others.
        """
        from flr.model.backbone import causal_lm

        assert self.model is not None
        model, processor = load_trained(
            self.model, dataset, self.revision, is_trainable=True, max_prompt_tokens=data.max_prompt_tokens
        )
        thought, prompts = causal_lm(model)._flr_patch.config.to_dict(), ("codec", "max_history", "max_title_tokens")
        saved = {**thought, **{name: getattr(processor, name) for name in prompts}, "template": processor.template.text}
        given = {**vars(data), **config.to_dict()}
        default = {**vars(DataOptions()), **FLRConfig().to_dict()}
        for name, own in saved.items():
            if given[name] not in (default[name], own):
                raise ValueError(f"{name}: expected {own!r}, that of {self.model}, or nothing, got {given[name]!r}")
        processor.views = data.views() or processor.views
        return self._frozen(model), processor

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
        try:
            config = AutoConfig.for_model(self.architecture, **shape)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # every family has checks, and kinds of errors, of its own
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            reason = " ".join(str(error).split())
            expected = f"sizes that {self.architecture} can be built with"
            raise ValueError(f"architecture: expected {expected}, got {sizes}: {reason}") from error
        return check_causal(model, "architecture", self.architecture)

    def _pretrained(self, folder: Path, tokenizer: Any) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        model.name_or_path = model.config.name_or_path = str(self.model)  # not the place in the Hub's cache
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        return check_causal(model, "model", str(self.model))


def check_causal(model: Any, name: str, value: str) -> Any:
    """``model``; ValueError for an encoder, whose tokens see the ones after them."""
    kind = model.config.model_type
    if getattr(model.config, "is_decoder", None) is False and kind not in _CAUSAL_ANYWAY:
        raise ValueError(f"{name}: expected a causal LM, got {value}, an encoder or encoder-decoder ({kind})")
    return model


def load_trained(
    name: str,
    dataset: RecDataset,
    revision: str | None = None,
    is_trainable: bool = False,
    max_prompt_tokens: int | None = None,
) -> tuple[Any, RecProcessor]:
    """Model and processor in a folder or on the Hub; ValueError where they were trained on another catalogue."""
    from flr.data import RecProcessor
    from flr.model.checkpoint import load_from

    model, folder = load_from(name, revision=revision, is_trainable=is_trainable)
    processor = RecProcessor.from_pretrained(folder)
    if max_prompt_tokens is not None:
        processor.bound_prompts(max_prompt_tokens)
    if processor.catalogue.item_ids != dataset.catalogue.item_ids:
        raise ValueError(f"data: expected the catalogue that {name} was trained on, got another one")
    return model, processor
