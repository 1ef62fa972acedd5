"""What a prompt is made by, the text around a history and the views of it, and how prompts become a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .csr import CSR

_HISTORY = "{history}"
_TEXT_PROMPT = (
    "A customer has chosen these items, from the earliest to the latest:\n{history}\nThe item chosen next is:\n"
)
MAX_TEXT = 1 << 16  # characters of a template


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a history.

    Attributes:
        text: holds the placeholder ``{history}`` exactly once; every other character is taken as it is.
        separator: text between two items (an item's tokens already end or have a fixed number, so none is needed).
        bos: begin with the tokenizer's bos token (its eos token where it has no bos).

    Example:
        >>> PromptTemplate("Listened to: {history}.").parts
        ('Listened to: ', '.')
    """

    text: str = _HISTORY
    separator: str = ""
    bos: bool = True

    def __post_init__(self) -> None:
        for name in ("text", "separator"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > MAX_TEXT:
                got = f"{len(value)}" if isinstance(value, str) else repr(value)[:80]
                raise ValueError(f"{name}: expected text of at most {MAX_TEXT} characters, got {got}")
        if not isinstance(self.bos, bool):
            raise ValueError(f"bos: expected True or False, got {self.bos!r:.80}")
        if self.text.count(_HISTORY) != 1:
            raise ValueError(f"text: expected the placeholder {_HISTORY} exactly once, got {self.text!r}")

    @property
    def parts(self) -> tuple[str, str]:
        """The text before and after the history."""
        before, after = self.text.split(_HISTORY)
        return before, after

    @classmethod
    def default(cls, codec: str) -> PromptTemplate:
        """A sentence for codec "title", the bare history for "id" and "sid"."""
        return cls(_TEXT_PROMPT) if codec == "title" else cls()


@dataclass(frozen=True)
class HistoryViews:
    """Answer from several views of a history: the whole prompt, and each item alone (see :mod:`flr.decode.mixture`).

    Attributes:
        weight: of the one-item views together, 0..1; the whole prompt has the rest.
        decay: weight of an item relative to the next later one, in (0, 1].
        neighbours: weight of item-kNN or of a linear model, 0..1; whole prompt and one-item views share the rest.
    """

    weight: float = 0.5
    decay: float = 0.6
    neighbours: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, (int, float)) and 0 <= self.weight <= 1):
            raise ValueError(f"weight: expected a number in 0..1, got {self.weight!r:.80}")
        if not (isinstance(self.neighbours, (int, float)) and 0 <= self.neighbours <= 1):
            raise ValueError(f"neighbours: expected a number in 0..1, got {self.neighbours!r:.80}")
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay <= 1):
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay!r:.80}")

    @property
    def mixes(self) -> bool:
        """Whether anything takes part beside the whole prompt."""
        return self.weight > 0 or self.neighbours > 0


@dataclass(frozen=True)
class Segment:
    """Prompts of a batch before padding: a flat array of tokens and, for each, the history entry it belongs to."""

    tokens: CSR  # int32 values, int64 offsets [B + 1]
    entries: np.ndarray  # int64 [total], -1 outside the history's items


def left_pad(prompts: Segment, pad_token_id: int, extra: int = 0) -> dict[str, np.ndarray]:
    """input_ids, attention_mask, item_positions, int64 [B, L + extra]: prompts end at column L, the rest is padding."""
    lengths = prompts.tokens.lengths
    batch, width = len(lengths), int(lengths.max())
    rows = np.repeat(np.arange(batch), lengths)
    columns = np.arange(len(prompts.entries)) + np.repeat(width - prompts.tokens.offsets[1:], lengths)
    arrays = {}
    for name, padding, values in (
        ("input_ids", pad_token_id, prompts.tokens.values),
        ("attention_mask", 0, 1),
        ("item_positions", -1, prompts.entries),
    ):
        arrays[name] = np.full((batch, width + extra), padding, np.int64)
        arrays[name][rows, columns] = values
    return arrays


def finish_batch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Tensors of ``arrays`` (input_ids, attention_mask, item_positions, …) plus position_ids and reasoner_mask."""
    mask = arrays["attention_mask"]
    arrays["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0) * mask
    arrays["reasoner_mask"] = arrays["item_positions"] >= 0
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
