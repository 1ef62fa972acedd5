"""Options that commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flr.config import (
    COUNT,
    COUNT_FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    Numbers,
    check_beside,
    check_numbers,
    option,
)

from . import voice

if TYPE_CHECKING:  # a command's --help waits for none of these
    from flr.data import Augment, HistoryViews, Interactions, RecDataset, RecProcessor, Teacher

_LONG = 5_000  # items whose linear model takes long enough to say so


def check_option(options: Any, expected: str, ok: bool, name: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {getattr(options, name)!r}")


def check_as_saved(model: str, saved: Mapping[str, Any], given: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """ValueError that names an option that says otherwise than the saved ``model``, and would have no effect.

    One that has its default is taken for not given.
    """
    for name, own in saved.items():
        if given[name] not in (default[name], own):
            raise ValueError(f"{name}: expected {own!r}, that of {model}, or nothing, got {given[name]!r}")


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
    views_decay: float | None = option(
        None, "Views: weight of an item relative to the next later one. Default: 0.6, or as saved."
    )
    max_title_tokens: int | None = option(None, "Codec title: tokens kept of a title.")
    vocab_size: int = option(8192, "Codec title: size of the tokenizer trained from scratch.")
    planted_items: int = option(500, "Generated data: items.")
    planted_users: int = option(2000, "Generated data: users.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "max_history": COUNT,
        "max_prompt_tokens": COUNT.or_none,
        "views_weight": PROBABILITY.or_none,
        "views_decay": Numbers(0, 1, "(]").or_none,
        "max_title_tokens": COUNT.or_none,
        "vocab_size": COUNT,
        "planted_items": Numbers(8, whole=True),  # two of each of four interests
        "planted_users": Numbers(10, whole=True),
    }

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)

    def views(self, saved: HistoryViews | None = None) -> HistoryViews | None:
        """The views that are asked for; those that a model was ``saved`` with where none are.

        Raises:
            ValueError: a decay alone, which would have no effect.
        """
        from flr.data import HistoryViews

        if self.views_weight is None:
            if self.views_decay not in (None, None if saved is None else saved.decay):
                raise ValueError(f"views_decay: expected a views_weight beside it, got {self.views_decay:g} alone")
            return saved
        own = saved or HistoryViews()
        return dataclasses.replace(own, weight=self.views_weight, decay=self.views_decay or own.decay)

    def check_model(self, model: str, processor: RecProcessor) -> None:
        """ValueError where an option says otherwise than the processor of a saved ``model``."""
        saved = {name: getattr(processor, name) for name in ("codec", "max_history", "max_title_tokens")}
        saved |= {"template": processor.template.text, "vocab_size": processor.tokenizer.vocab_size}
        check_as_saved(model, saved, vars(self), vars(DataOptions()))

    def load(self) -> RecDataset:
        from flr.data import load_dataset, planted_dataset

        if self.data == "planted":
            return planted_dataset(num_items=self.planted_items, num_users=self.planted_users)
        return load_dataset(self.data, self.data_format)

    def announce(self) -> RecDataset:
        """The data, after a note that says what they are."""
        if self.data == "planted":
            voice.note("Generated data, which show that everything runs; --data FOLDER takes yours.")
        dataset = self.load()
        voice.note(f"Data {dataset.name!r}: {in_words(dataset)}.")
        return dataset


@dataclass
class AugmentOptions:
    """How training histories are varied."""

    expand_prefixes: bool = option(False, "Train on every prefix of a history too.")
    held_back: float = option(
        0.0, "Leave this share of train out, the latest rows, for flr rl --held_back to be rewarded on."
    )
    augment_reverse: float = option(0.0, "Probability that a row is read backwards, to an item that is drawn.")
    augment_prefix: float = option(0.0, "Probability that a row is cut at a random place.")
    augment_suffix: float = option(0.0, "Probability that only a random number of the latest items is kept.")
    augment_drop_item: float = option(0.0, "Probability that an item of a history is left out.")
    augment_shuffle: float = option(0.0, "Probability that a history is shuffled locally.")
    augment_single: float = option(0.0, "Probability that a history is reduced to one of its items.")
    augment_neighbour: float = option(0.0, "Probability that the target is drawn from an item's neighbours instead.")
    teacher: str = option(
        "none",
        "Whose answers are a part of every target: linear (up to 25,000 items) or item-knn, as if they had not seen "
        "the row's user; auto, whichever ranks train better that way; or none.",
    )
    teacher_weight: float = option(0.5, "The teacher's share of a target, above 0 and at most 1.")
    teacher_temperature: float = option(0.5, "Of the teacher's answers; below 1 sharpens.")
    catalogue_rows: int = option(0, "Rows added for every item of the catalogue: the item, then a drawn neighbour.")
    neighbour_content: float = option(1.0, "Neighbours: weight of title similarity beside co-occurrence.")
    neighbour_temperature: float = option(1.0, "Neighbours: below 1 sharpens.")

    numbers: ClassVar[Mapping[str, Numbers]] = {
        "held_back": SHARE,
        "augment_reverse": PROBABILITY,
        "augment_prefix": PROBABILITY,
        "augment_suffix": PROBABILITY,
        "augment_drop_item": PROBABILITY,
        "augment_shuffle": PROBABILITY,
        "augment_single": PROBABILITY,
        "augment_neighbour": PROBABILITY,
        "teacher_weight": Numbers(0, 1, "(]"),
        "teacher_temperature": POSITIVE,
        "catalogue_rows": COUNT_FROM_ZERO,
        "neighbour_content": NOT_NEGATIVE,
        "neighbour_temperature": POSITIVE,
    }

    def __post_init__(self) -> None:
        check_numbers(self, self.numbers)
        teachers = ("none", "auto", "linear", "item-knn")
        check_option(self, f"one of {', '.join(teachers)}", self.teacher in teachers, "teacher")
        needed = ("a teacher", self.teacher != "none")
        check_beside(self, dict.fromkeys(("teacher_weight", "teacher_temperature"), needed))
        needed = ("augment_neighbour or catalogue_rows", bool(self.augment_neighbour or self.catalogue_rows))
        check_beside(self, dict.fromkeys(("neighbour_content", "neighbour_temperature"), needed))

    def apply(
        self, dataset: RecDataset, max_history: int, learned: Interactions | None = None
    ) -> tuple[Interactions, Augment]:
        """Training rows, and how to vary them.

        ``learned``: rows to learn instead of ``dataset.train``, in which neighbours are counted all the same.
        """
        from flr.data import Augment, hold_back
        from flr.data import expand_prefixes as all_prefixes
        from flr.train import item_neighbours, with_catalogue_rows

        options = [f.name for f in dataclasses.fields(self) if f.name.startswith("augment_")]
        chances = {name.removeprefix("augment_"): getattr(self, name) for name in options}
        train = dataset.train if learned is None else learned
        train = hold_back(train, self.held_back)[0] if self.held_back else train
        rows = all_prefixes(train, max_history=max_history) if self.expand_prefixes else train
        counted = train if learned is None else dataset.train  # an update holds nothing back
        table = None
        if self.augment_neighbour or self.catalogue_rows:
            content, temperature = self.neighbour_content, self.neighbour_temperature
            table = item_neighbours(counted, dataset.catalogue, content=content, temperature=temperature)
            rows = with_catalogue_rows(rows, table, self.catalogue_rows)
        return rows, Augment(**chances, neighbours=table, teacher=self._teacher(counted, len(dataset.catalogue)))

    def _teacher(self, train: Interactions, size: int) -> Teacher | None:
        from flr.data import MOST_LINEAR_ITEMS, Teacher

        if self.teacher == "none":
            return None
        if self.teacher == "linear" or (self.teacher == "auto" and size <= MOST_LINEAR_ITEMS):
            announce_linear(size)
        options = {"weight": self.teacher_weight, "temperature": self.teacher_temperature}
        teacher = Teacher.fit(train, size, self.teacher, **options)
        voice.note(f"Teacher: {teacher.left_out.name}, {size:,} items.")
        return teacher


def announce_linear(size: int) -> None:
    """Say that a linear model is solved, where it has so many items that one waits for it."""
    if size > _LONG:
        voice.note(f"Solving a linear model of {size:,} items; 10,000 take half a minute of one core.")


def in_words(dataset: RecDataset) -> str:
    """How large a data set is."""
    sizes = (len(dataset.catalogue), len(dataset.train), len(dataset.valid), len(dataset.test))
    return "{:,} items; {:,} rows to train on, {:,} of valid, {:,} of test".format(*sizes)


def load_trained(
    name: str,
    dataset: RecDataset | None,
    revision: str | None = None,
    is_trainable: bool = False,
    data: DataOptions | None = None,
    device: str | None = None,
    **loading: Any,
) -> tuple[Any, RecProcessor]:
    """Model and processor in a folder or on the Hub.

    ``data``: options of a command, of which ``max_prompt_tokens`` bounds prompts. ``device``: as for
    :func:`flr.model.backbone.placed`. ``loading``: dtype, attn_implementation and others of
    :func:`flr.from_pretrained`.

    Raises:
        ValueError: ``dataset`` has another catalogue, or ``data`` says otherwise than the model.
    """
    from flr.data import RecProcessor
    from flr.model.backbone import placed
    from flr.model.checkpoint import load_from

    model, folder = load_from(name, revision=revision, is_trainable=is_trainable, **loading)
    placed(model, device)
    processor = RecProcessor.from_pretrained(folder)
    if dataset is not None and processor.catalogue.item_ids != dataset.catalogue.item_ids:
        raise ValueError(f"data: expected the catalogue that {name} was trained on, got another one")
    if data is not None:
        data.check_model(name, processor)
        if data.max_prompt_tokens is not None:
            processor.bound_prompts(data.max_prompt_tokens)
    return model, processor
