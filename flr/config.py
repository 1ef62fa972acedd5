"""Configuration of the latent thought. Stored in ``model.config.flr`` and therefore in the saved ``config.json``."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

VARIANTS = ("flr", "offsets", "latentr3", "anchor", "none")
AGGREGATIONS = ("thought", "mixture")
ANCHORS = ("token", "last", "none")
SPARSITY_TARGETS = ("gate", "attention", "both")
MOST_FACTORS = 16
_MOST, _MOST_SIZE = 1024, 1 << 16  # thoughts and refinements; the size of a factor

#: What a token competes with, the vocabulary or its siblings: ``scoring`` of decoding, ``normalisation`` of training.
Normalisation: TypeAlias = Literal["full", "catalogue"]

#: What weights may be loaded in; "auto" leaves it to the checkpoint, or to what is done with them.
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Instead of names of layers: adapters on all linear ones but the head's, as PEFT calls it.
ALL_LINEAR = "all-linear"

#: What transformers may compute a backbone's attention by.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")

#: The label of a position that carries no loss, as everywhere in transformers.
IGNORE = -100


#: The most that one request may ask for: items, beams, and entries of a history or a list of values.
MAX_K, MAX_BEAMS, MAX_ENTRIES = 1000, 1000, 10_000


def check_normalisation(name: str, value: str, *others: str) -> Any:
    """``value``, if it is a :data:`Normalisation` or one of ``others``; else ValueError, which calls it ``name``."""
    allowed = (*others, *get_args(Normalisation))
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def option(default: Any, text: str) -> Any:
    """A field of an options class with its help text; a list as default is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Numbers:
    """Which numbers an option takes: finite ones in a range. As text it is what an error says was expected.

    Attributes:
        low, high: bounds of the range.
        ends: as a range is written, with ``(`` or ``)`` where a bound is not in it itself; without a bound above ``(``
            is for positive numbers alone.
        whole: integers alone.
        also: values beside the range; None for an option that may be left out.

    Example:
        >>> share = Numbers(0, 1, "[)")
        >>> [share.takes(value) for value in (0, 1, float("nan"), None, True)], str(share)
        ([True, False, False, False, False], 'a number in [0, 1)')
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    whole: bool = False
    also: tuple[Any, ...] = ()

    @property
    def or_none(self) -> Numbers:
        """The same, or None."""
        return dataclasses.replace(self, also=(*self.also, None))

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is one of them."""
        is_number = isinstance(value, numbers.Integral if self.whole else numbers.Real) and not isinstance(value, bool)
        if not is_number:
            return value is None and None in self.also
        if value in self.also:
            return True
        above = self.low < value if self.ends[0] == "(" else self.low <= value
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below and abs(value) < math.inf  # true of no NaN

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        if self.whole and self.low > -math.inf and self.high < math.inf:
            text = f"{kind} from {self.low} to {self.high}"
        elif self.high < math.inf:
            text = f"{kind} in {self.ends[0]}{self.low:.10g}, {self.high:.10g}{self.ends[1]}"
        elif self.low == -math.inf:
            text = kind if self.whole else "a finite number"
        else:
            text = f"{kind} >= {self.low:.10g}" if self.ends[0] == "[" else "a positive number"
        return " or ".join([*map(str, self.also), text])


#: Ranges that many options have.
NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE = Numbers(0), Numbers(0, ends="(]"), Numbers(0, 1), Numbers(0, 1, "[)")
COUNT, COUNT_FROM_ZERO = Numbers(1, whole=True), Numbers(0, whole=True)
SEED = Numbers(0, 2**32 - 1, whole=True)  # what numpy takes


def check_numbers(options: Any, table: Mapping[str, Numbers]) -> None:
    """ValueError that names the first option in ``table`` whose value is none of its numbers."""
    for name, taken in table.items():
        if not taken.takes(value := getattr(options, name)):
            raise ValueError(f"{name}: expected {taken}, got {value!r}")


def given(options: Any, *names: str) -> dict[str, Any]:
    """Options by name, of all or of ``names``, that are not as by default."""
    fields = [field for field in dataclasses.fields(options) if not names or field.name in names]
    return {f.name: value for f in fields if (value := getattr(options, f.name)) != f.default}


def check_beside(options: Any, needed: Mapping[str, tuple[str, bool]]) -> None:
    """ValueError for the first option that is not as by default and has no effect without another.

    ``needed``: by its name, what the option needs, and whether that is there.
    """
    for name, value in given(options, *needed).items():
        what, there = needed[name]
        if not there:
            raise ValueError(f"{name}: expected {what} beside it, got {value!r} alone")


#: Of :class:`FLRConfig`, beside its counts.
FLR_NUMBERS = {
    "input_scale": POSITIVE.or_none,
    "gate_temperature": POSITIVE,
    "dropout": SHARE,
    "init_scale": NOT_NEGATIVE,
    "orthogonality_weight": NOT_NEGATIVE,
    "diversity_weight": NOT_NEGATIVE,
    "sparsity_weight": NOT_NEGATIVE,
}


@dataclass
class FLRConfig:
    """How a model makes its latent thought.

    Attributes:
        variant: ``"flr"`` K factors; ``"latentr3"`` the single-factor predecessor (K = 1, T = 1, F = D, biases, rotary
            positions, no anchor); ``"offsets"`` K learned vectors in the factors' place, the same for every user, which
            attend to nothing, ``"anchor"`` one more token and no factors, both controls; ``"none"`` no thought.
        aggregation: of the factors: ``"thought"`` their gated sum is one thought; ``"mixture"`` each makes a thought of
            its own and the gates mix what is predicted after them (:mod:`flr.model.factor_mixture`).
        num_factors: K, 1 to 16.
        factor_size: F, the head size of a factor; None for D / K (at least 1), about 4 D² weights whatever K is.
        num_refinements: T in 1..1024, how often the thought is refined.
        num_thoughts: N in 1..1024, thought tokens between prompt and target.
        anchor: what the factors' sum is added to: ``"token"`` the embedding of the thought token, ``"last"`` that of
            the last prompt token (for one-token item codecs), ``"none"``.
        gate_temperature: τ > 0 of the gate softmax.
        dropout: on what is added to the anchor, the factors' sum r or each factor of a mixture, in [0, 1).
        init_scale: RMS of r in a freshly patched model relative to the RMS of the input embeddings; under either
            aggregation, which therefore begin with the same weights.
        orthogonality_weight, diversity_weight, sparsity_weight: λ >= 0 of the regularisers, each of which is in [0, 1].
        sparsity_target: entropy of the gates, of the attention, or the mean of both.
        thought_token: text of the thought token, added to the tokenizer when it is missing.
        thought_token_id: its id; taken from the tokenizer, or the first after the embeddings when there is none.
        insert_thought: give a batch without thought tokens N of them in every row, before its first label or at the
            end of its prompt.
        input_scale: RMS of the model's input embeddings, the unit in which a contribution is short or long; measured
            by ``patch_model`` when None.

    Example:
        >>> FLRConfig(num_factors=4).head_size(hidden_size=64)
        16
        >>> FLRConfig(num_factors=0)
        Traceback (most recent call last):
        ...
        ValueError: num_factors: expected 1 to 16, got 0
    """

    variant: str = "flr"
    aggregation: str = "thought"
    num_factors: int = 4
    factor_size: int | None = None
    num_refinements: int = 2
    num_thoughts: int = 1
    anchor: str = "token"
    gate_temperature: float = 1.0
    dropout: float = 0.0
    init_scale: float = 0.01
    orthogonality_weight: float = 0.01
    diversity_weight: float = 0.01
    sparsity_weight: float = 0.001
    sparsity_target: str = "gate"
    thought_token: str = "<|thought|>"
    thought_token_id: int | None = None
    insert_thought: bool = True
    input_scale: float | None = None

    def __post_init__(self) -> None:
        choices = (("variant", VARIANTS), ("aggregation", AGGREGATIONS), ("anchor", ANCHORS))
        for name, allowed in (*choices, ("sparsity_target", SPARSITY_TARGETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.variant == "latentr3":
            self.num_factors, self.num_refinements, self.factor_size, self.anchor = 1, 1, None, "none"
        elif self.variant == "offsets":
            self.num_refinements, self.factor_size = 1, None
            self._check("sparsity_target", self.sparsity_target == "gate", "gate for offsets, which attend to nothing")
        fits = isinstance(self.num_factors, int) and 1 <= self.num_factors <= MOST_FACTORS
        self._check("num_factors", fits, f"1 to {MOST_FACTORS}")
        for name in ("num_refinements", "num_thoughts"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and 1 <= value <= _MOST, f"an integer from 1 to {_MOST}")
        size, token = self.factor_size, self.thought_token_id
        fits = size is None or (isinstance(size, int) and 1 <= size <= _MOST_SIZE)
        self._check("factor_size", fits, f"None or an integer from 1 to {_MOST_SIZE}")
        self._check("thought_token_id", token is None or (isinstance(token, int) and token >= 0), "None or an id >= 0")
        check_numbers(self, FLR_NUMBERS)
        self._check("insert_thought", isinstance(self.insert_thought, bool), "True or False")
        self._check("thought_token", bool(self.thought_token), "a token's text")

        if self.aggregation == "mixture":
            mixes = self.variant in ("flr", "offsets")
            self._check("aggregation", mixes, f"thought for variant {self.variant}, which has no factors to mix")
            self._check("num_thoughts", self.num_thoughts == 1, "1 with aggregation mixture")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def thought_count(self) -> int:
        """Thought tokens that a prompt of this variant ends with: N, or 0 for ``"none"``."""
        return 0 if self.variant == "none" else self.num_thoughts

    @property
    def has_reasoner(self) -> bool:
        """Whether this variant's thought is made of factors, K >= 1."""
        return self.variant in ("flr", "offsets", "latentr3")

    @property
    def mixes(self) -> bool:
        """Whether predictions of K thoughts are mixed."""
        return self.aggregation == "mixture"

    def head_size(self, hidden_size: int) -> int:
        """F for a backbone of this hidden size."""
        return self.factor_size or max(hidden_size // self.num_factors, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FLRConfig:
        """The inverse of :meth:`to_dict`; an unknown key raises ValueError."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"values: expected options of FLRConfig, got {', '.join(sorted(unknown))}")
        return cls(**values)
