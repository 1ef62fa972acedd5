"""Histories to model inputs: the bundle of tokenizer, catalogue, codec and prompt template stored beside a model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from flr.config import check_normalisation
from flr.files import PathLike

from .catalogue import Catalogue
from .codecs import CodecName, ItemCodec, build_codec, token_ids
from .csr import CSR, check_whole, offsets_of, places_within
from .digests import integers_digest
from .interactions import Interactions
from .item_knn import NeighbourTable
from .processor_folder import load_processor, save_processor
from .prompt import MAX_TEXT, HistoryViews, PromptTemplate, Segment, finish_batch, left_pad

logger = logging.getLogger("flr")

THOUGHT_TOKEN = "<|thought|>"
_MAX_THOUGHTS = 1024


class RecProcessor:
    """Turns histories into model inputs.

    Args:
        tokenizer: a fast Hugging Face tokenizer; the tokens that codec and thought need are added to it.
        catalogue: the items.
        codec: "title", "sid" or "id" (see :mod:`flr.data.codecs`).
        template: prompt text; None takes :meth:`PromptTemplate.default` of the codec.
        max_history: items kept, the latest ones; at least 1.
        num_thoughts: thought tokens at the prompt's end; 0 for a model without a thought.
        thought_token: added to the tokenizer as a special token if it is missing and num_thoughts > 0.
        max_prompt_tokens: upper bound on prompt tokens, thoughts included; the earliest items are left out to keep it.
            It must leave room for the template and the longest item.
        max_title_tokens: codec "title" only, cuts long titles.
        views: how evaluation and recommendation weigh several views of a history; None for the whole prompt alone.
        item_knn: the table that ``views.neighbours`` gives a weight; needed where that is above 0.
        item_codec: of this catalogue and tokenizer where it is there already; built when None.
        growth: sizes that the catalogue had before items were added (see :meth:`grown`), ascending.
        scoring: "full" or "catalogue", what the model's probabilities are normalised over unless the caller says
            otherwise (see :mod:`flr.decode`); training sets it to its own normalisation.

    Attributes:
        item_codec: the :class:`ItemCodec` (``codec`` is its name).
        thought_token_id: None where num_thoughts is 0.
        pad_token_id: the tokenizer's pad token, else its eos token, else 0 (padding is masked, so any id does).
        max_positions: of the model, see :meth:`fit_positions`; None where nothing bounds them.
        items_left_out: how many items of histories :meth:`kept` left out so far to keep prompts within bounds.

    Raises:
        ValueError: an unknown codec, sizes out of range, template text that the tokenizer cannot express.

    Example:
        >>> from flr.data import build_tokenizer
        >>> catalogue = Catalogue(["x", "y", "z"], ["Blue", "Green", "Red"])
        >>> processor = RecProcessor(build_tokenizer(catalogue, "id"), catalogue)
        >>> batch = processor([[0, 2], [1]])
        >>> processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][1])
        ['<|pad|>', '<|bos|>', '<|item_1|>', '<|thought|>']
        >>> batch["item_positions"].tolist()
        [[-1, 0, 1, -1], [-1, -1, 0, -1]]
    """

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        codec: str = "id",
        template: PromptTemplate | None = None,
        max_history: int = 10,
        num_thoughts: int = 1,
        *,
        thought_token: str = THOUGHT_TOKEN,
        max_prompt_tokens: int | None = None,
        max_title_tokens: int | None = None,
        views: HistoryViews | None = None,
        item_knn: NeighbourTable | None = None,
        scoring: str = "full",
        item_codec: ItemCodec | None = None,
        growth: Sequence[int] = (),
    ) -> None:
        check_whole("max_history", max_history, 1)
        check_whole("num_thoughts", num_thoughts, 0, _MAX_THOUGHTS)
        if max_title_tokens is not None:
            check_whole("max_title_tokens", max_title_tokens, 1)
        if not isinstance(thought_token, str) or not 0 < len(thought_token) <= MAX_TEXT:
            raise ValueError(f"thought_token: expected text, got {thought_token!r:.80}")
        self.tokenizer = tokenizer
        self.catalogue = catalogue
        self.template = PromptTemplate.default(codec) if template is None else template
        self.max_history = max_history
        self.num_thoughts = num_thoughts
        self.thought_token = thought_token
        self.max_positions: int | None = None
        self.items_left_out = 0
        self.max_title_tokens = max_title_tokens
        self.views = views
        self.item_knn = item_knn
        if item_knn is not None and len(item_knn) != len(catalogue):
            raise ValueError(f"item_knn: expected a table of {len(catalogue)} items, got {len(item_knn)}")
        self.scoring = check_normalisation("scoring", scoring)
        self.thought_token_id: int | None = None
        if num_thoughts:
            self.thought_token_id = int(token_ids(tokenizer, [thought_token], special=True)[0])
        for size in growth:
            check_whole("growth", size, 1, len(catalogue) - 1)
        self.growth = tuple(int(size) for size in growth)
        if item_codec is None:
            options: dict[str, Any] = {"max_title_tokens": max_title_tokens, "growth": self.growth}
            item_codec = build_codec(codec, catalogue, tokenizer, **options)
        if (item_codec.name, len(item_codec)) != (codec, len(catalogue)):
            wanted, got = f"{codec!r} of {len(catalogue)} items", f"{item_codec.name!r} of {len(item_codec)}"
            raise ValueError(f"item_codec: expected {wanted}, got {got}")
        self.item_codec: ItemCodec = item_codec
        self._store_key: str | None = None
        pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
        self.pad_token_id: int = next((token for token in (pad, eos) if token is not None), 0)
        start = bos if bos is not None else eos
        before, after = self.template.parts
        self._prefix = [start] * (self.template.bos and start is not None) + self._text_tokens(before)
        self._suffix = self._text_tokens(after)
        self._separator = self._text_tokens(self.template.separator)
        if not self._prefix and not self._suffix:
            wanted = "a bos token or text, so that the prompt of an empty history has a token"
            raise ValueError(f"template: expected {wanted}, got none")
        self._fixed = len(self._prefix) + len(self._suffix) + num_thoughts  # tokens of an empty history's prompt
        self._longest = int(self.item_codec.lengths.max())
        self.bound_prompts(max_prompt_tokens)

    def grown(self, catalogue: Catalogue) -> RecProcessor:
        """A processor with the same settings for a catalogue that begins with this one's items, whose tokens stay.

        The tokenizer is copied, and new tokens come after all that it has. A table of item-kNN knows nothing of new
        items.

        Raises:
            ValueError: other items at the beginning, or new ones whose tokens would change those of a known one.
        """
        known = len(self.catalogue)
        if catalogue.item_ids[:known] != self.catalogue.item_ids:
            raise ValueError(f"catalogue: expected the {known} items that are known at its beginning, got others")
        growth = (*self.growth, known) if len(catalogue) > known else self.growth
        names = ("max_prompt_tokens", "max_title_tokens", "thought_token", "views", "scoring")
        larger = type(self)(
            copy.deepcopy(self.tokenizer),
            catalogue,
            self.codec,
            self.template,
            self.max_history,
            self.num_thoughts,
            item_knn=None if self.item_knn is None else self.item_knn.padded(len(catalogue)),
            growth=growth,
            **{name: getattr(self, name) for name in names},
        )
        larger.fit_positions(self.max_positions)
        old, new = self.item_codec, larger.item_codec
        end = int(old.offsets[-1])
        if not (np.array_equal(new.offsets[: known + 1], old.offsets) and np.array_equal(new.tokens[:end], old.tokens)):
            raise ValueError("catalogue: expected known items with the titles and codes that they had, got others")
        return larger

    def bound_prompts(self, max_prompt_tokens: int | None) -> None:
        """Set ``max_prompt_tokens``; ValueError where it is below template and longest item, or past the positions."""
        least, most = self._fixed + self._longest, self._position_bound
        if max_prompt_tokens is not None:
            check_whole("max_prompt_tokens", max_prompt_tokens, 1)
            if max_prompt_tokens < least:
                parts = f"{self._fixed} for template and thoughts, {self._longest} for the longest item"
                raise ValueError(f"max_prompt_tokens: expected at least {least} ({parts}), got {max_prompt_tokens}")
            if most is not None and max_prompt_tokens > most:
                parts = f"{self.max_positions} positions of the model, {self._longest} of them for the longest item"
                raise ValueError(f"max_prompt_tokens: expected at most {most} ({parts}), got {max_prompt_tokens}")
        self.max_prompt_tokens = max_prompt_tokens

    def fit_positions(self, max_positions: int | None) -> None:
        """Keep prompt and next item within the positions of a model (``flr.model.backbone.position_limit``).

        Trainers, evaluation and recommenders call this with their model's; the smallest ever given holds, and is saved.

        Args:
            max_positions: tokens that the model has positions for; None changes nothing.

        Raises:
            ValueError: template, thoughts and the longest item do not fit, or ``max_prompt_tokens`` is larger.
        """
        if max_positions is not None:
            check_whole("max_positions", max_positions, 1)
        if max_positions is None or (self.max_positions is not None and self.max_positions <= max_positions):
            return
        least = self._fixed + self._longest
        if max_positions < least:
            parts = f"{self._fixed} for template and thoughts, {self._longest} for the longest item"
            raise ValueError(f"positions of the model: expected at least {least} ({parts}), got {max_positions}")
        before, self.max_positions = self.max_positions, max_positions
        try:
            self.bound_prompts(self.max_prompt_tokens)
        except ValueError:
            self.max_positions = before
            raise

    @property
    def _position_bound(self) -> int | None:
        return None if self.max_positions is None else self.max_positions - self._longest

    @property
    def prompt_limit(self) -> int | None:
        """Tokens that a prompt may have, thoughts included: ``max_prompt_tokens``, else what the positions leave."""
        return self._position_bound if self.max_prompt_tokens is None else self.max_prompt_tokens

    @property
    def codec(self) -> CodecName:
        """Name of the item codec."""
        return self.item_codec.name

    def __repr__(self) -> str:
        return (
            f"RecProcessor({len(self.catalogue)} items as {self.codec!r}, {len(self.tokenizer)} tokens, "
            f"max_history={self.max_history}, num_thoughts={self.num_thoughts})"
        )

    def __call__(self, histories: Sequence[Sequence[int] | np.ndarray] | Interactions | CSR) -> dict[str, torch.Tensor]:
        """Prompts of a batch, left-padded to the longest one.

        Args:
            histories: item indices, oldest first; a history may be empty (the prompt is then the template and the
                thought) and of any length (the last ``max_history`` items count).

        Returns:
            input_ids: int64 [B, L], the last num_thoughts columns hold the thought token.
            attention_mask: int64 [B, L], 0 on padding.
            position_ids: int64 [B, L], counted from a row's first token, 0 on padding.
            reasoner_mask: bool [B, L], tokens of history items (all False for an empty history).
            item_positions: int64 [B, L], the entry of the given history (0 = first) that a token belongs to, else -1.

        Raises:
            ValueError: an empty batch or an index out of the catalogue.
        """
        prompts = self.prompts(_as_csr(histories))
        if len(prompts.tokens.offsets) == 1:
            raise ValueError("histories: expected at least one, got none")
        return finish_batch(left_pad(prompts, self.pad_token_id))

    def prompts(self, histories: CSR) -> Segment:
        """Tokens of every prompt, thoughts included, without padding."""
        size, items = len(self.catalogue), histories.values
        if items.size and not (items.min() >= 0 and items.max() < size):
            raise ValueError(f"histories: expected item indices in 0..{size - 1}, got {items.min()}..{items.max()}")
        given = histories.lengths
        kept = self.kept(histories)
        codec, gap = self.item_codec, len(self._separator)
        counts = kept.lengths  # items of every prompt
        batch, first = len(counts), kept.offsets[:-1]
        is_first = np.zeros(len(kept.values) + 1, bool)
        is_first[first] = True  # rows without an item mark a place that another row's first item marks, or the end
        gaps = np.where(is_first[:-1], 0, gap)
        sizes = codec.offsets[kept.values + 1] - codec.offsets[kept.values]  # tokens of every item
        item_ends = offsets_of(sizes + gaps)
        history_tokens = item_ends[kept.offsets[1:]] - item_ends[first]
        head, tail = len(self._prefix), [*self._suffix, *([self.thought_token_id] * self.num_thoughts)]
        offsets = offsets_of(head + history_tokens + len(tail))
        tokens = np.empty(offsets[-1], np.int32)
        entries = np.full(offsets[-1], -1, np.int64)
        tokens[offsets[:-1, None] + np.arange(head)] = self._prefix
        tokens[offsets[1:, None] - len(tail) + np.arange(len(tail))] = tail
        shift = offsets[:-1] + head - item_ends[first]  # from a place among all items' tokens to one among all tokens
        item_rows = np.repeat(np.arange(batch), counts)
        starts = item_ends[:-1] + gaps + shift[item_rows]
        if gap:
            separated = starts[~is_first[:-1]]
            tokens[separated[:, None] - gap + np.arange(gap)] = self._separator
        within = places_within(sizes)
        places = np.repeat(starts, sizes) + within
        tokens[places] = codec.tokens[np.repeat(codec.offsets[kept.values], sizes) + within]
        entries[places] = np.repeat(places_within(counts) + (given - counts)[item_rows], sizes)
        return Segment(CSR(tokens, offsets), entries)

    def prompt_lengths(self, histories: CSR) -> np.ndarray:
        """Tokens of every prompt, thoughts included, int64 [B], as :meth:`prompts` makes them."""
        kept, gap = self._fitting(histories)[1], len(self._separator)
        ends = offsets_of(self.item_codec.lengths[kept.values] + gap)
        of_items = ends[kept.offsets[1:]] - ends[kept.offsets[:-1]]
        return self._fixed + of_items - gap * (kept.lengths > 0)

    def kept(self, histories: CSR) -> CSR:
        """The items that prompts show: the latest ``max_history`` of each history, fewer where they would not fit.

        What does not fit into :attr:`prompt_limit` tokens is left out from the front, item by item. It is counted in
        ``items_left_out``, and the first time a warning says how many there are.
        """
        latest, kept = self._fitting(histories)
        lost = latest.lengths - kept.lengths
        if (total := int(lost.sum())) and not self.items_left_out:
            rows = f"{np.count_nonzero(lost)} of {len(lost)} histories"
            logger.warning(
                f"prompts have at most {self.prompt_limit} tokens: {total} of {len(latest.values)} items are left out, "
                f"the earliest of {rows}; max_history, max_title_tokens or another template can change that"
            )
        self.items_left_out += total
        return kept

    def _fitting(self, histories: CSR) -> tuple[CSR, CSR]:
        """The latest ``max_history`` items of each history, and those of them that fit."""
        ends = histories.offsets[1:]
        latest = histories.slice(np.maximum(histories.offsets[:-1], ends - self.max_history), ends)
        if self.prompt_limit is None:
            return latest, latest
        room = self.prompt_limit - self._fixed + len(self._separator)
        offsets = self.item_codec.offsets
        sizes = offsets[latest.values + 1] - offsets[latest.values]
        cumulative = offsets_of(sizes + len(self._separator))
        starts = np.searchsorted(cumulative, cumulative[latest.offsets[1:]] - room, side="left")
        return latest, latest.slice(np.maximum(starts, latest.offsets[:-1]), latest.offsets[1:])

    def _text_tokens(self, text: str) -> list[int]:
        if not text:
            return []
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in tokens:
            reason = f"a tokenizer built for codec {self.codec!r} holds items only"
            raise ValueError(f"template: expected text that the tokenizer can express, got {text!r}; {reason}")
        return tokens

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer files, catalogue.parquet, item_tokens.safetensors (see :mod:`flr.data.token_store`),
        item_knn.safetensors where there is a table, and processor_config.json into the folder ``path``.

        The last file goes first and comes last: a save that was cut short is no processor rather than a mixed one.
        """
        save_processor(self, path)

    @classmethod
    def from_pretrained(cls, path: PathLike, like: RecProcessor | None = None) -> RecProcessor:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            path: the folder.
            like: a processor that was loaded before. Where catalogue and tokenizer files are the same, byte by byte,
                its catalogue and item codec are taken over, which neither of the two may change.

        Raises:
            ValueError: naming the file that is missing or damaged, or not the one that was saved with the others.
        """
        return load_processor(cls, path, like)

    def digests(self) -> dict[str, str]:
        """SHA-256, in hexadecimal, of what decides which item an answer means, by name.

        "catalogue": ids, titles and semantic IDs; "vocabulary": every token's id; "tokens": of every item and of the
        template. They depend on what the files say and not on how.
        """
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
        return {
            "catalogue": self.catalogue.digest(),
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "tokens": self._tokens_digest(),
        }

    def _tokens_digest(self) -> str:
        codec = self.item_codec
        return integers_digest(self._prefix, self._suffix, self._separator, codec.tokens, codec.offsets)


def _as_csr(histories: Sequence[Sequence[int] | np.ndarray] | Interactions | CSR) -> CSR:
    if isinstance(histories, Interactions):
        return histories.histories
    if isinstance(histories, CSR):
        return histories
    return CSR.from_rows(cast(Sequence[Sequence[int]], histories))
