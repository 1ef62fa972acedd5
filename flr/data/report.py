"""What a reader read, kept and refused."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

MAX_EXAMPLES = 5  # malformed rows kept with file and line
_REASON_LENGTH = 200


class BadRow(NamedTuple):
    """A malformed row: where it is (lines count from 1, header included) and what is wrong with it."""

    file: str
    line: int
    reason: str


@dataclass
class ReadReport:
    """Counts of one reading and the first malformed rows.

    Attributes:
        source: what was read.
        rows_read, rows_kept, rows_bad: rows of the source; read = kept + bad + those that a filter named in ``notes``
            left out.
        users, items: users with at least one row, items of the catalogue.
        examples: the first malformed rows.
        notes: what else the reader or the split has to say.

    Example:
        >>> report = ReadReport(source="log.csv", rows_read=200, rows_kept=199, users=3, items=7)
        >>> report.add_bad("log.csv", 12, "expected 3 cells, got 2")
        >>> print(report)
        log.csv: 200 rows read, 199 kept, 1 malformed (0.50 %); 3 users, 7 items
          log.csv:12: expected 3 cells, got 2
        >>> report.check(max_bad_share=0.001)
        Traceback (most recent call last):
        ...
        ValueError: log.csv: expected malformed rows up to max_bad_share 0.001, got 1 of 200
          log.csv:12: expected 3 cells, got 2
    """

    source: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    rows_bad: int = 0
    users: int = 0
    items: int = 0
    examples: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_bad(self, file: str, line: int, reason: str, rows: int = 1) -> None:
        """Count ``rows`` malformed rows; the first few are kept with where and why."""
        self.rows_bad += rows
        if len(self.examples) < MAX_EXAMPLES:
            reason = reason if len(reason) <= _REASON_LENGTH else reason[:_REASON_LENGTH] + "…"
            self.examples.append(BadRow(file, line, reason))

    def note_repeated(self, what: str, values: Sequence[Hashable]) -> None:
        """Say how many items have a ``what`` that an earlier one has."""
        if repeated := len(values) - len(set(values)):
            self.notes.append(f"{repeated} items have a {what} that an earlier item has too")

    def check(self, max_bad_share: float) -> None:
        """ValueError where more than ``max_bad_share`` (0..1) of the rows read are malformed."""
        if not isinstance(max_bad_share, numbers.Real) or not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share: expected 0..1, got {max_bad_share!r:.80}")
        if self.rows_bad > max_bad_share * self.rows_read:
            got = f"{self.rows_bad} of {self.rows_read}{self._examples()}"
            raise ValueError(f"{self.source}: expected malformed rows up to max_bad_share {max_bad_share:g}, got {got}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self) | {"examples": [example._asdict() for example in self.examples]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """The inverse of :meth:`to_dict`; unknown keys are ignored, values of other types raise ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"report: expected an object, got {type(values).__name__}")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name, value in known.items():
            wanted = type(getattr(cls(), name))
            if type(value) is not wanted:
                raise ValueError(f"report: {name}: expected {wanted.__name__}, got {type(value).__name__}")
        if not all(isinstance(note, str) for note in known.get("notes", [])):
            raise ValueError("report: notes: expected a list of text, got others")
        keys, forms = set(BadRow._fields), (str, int, str)
        for row in known.get("examples", []):
            if not isinstance(row, dict) or set(row) != keys or [type(row[key]) for key in BadRow._fields] != [*forms]:
                raise ValueError(f"report: examples: expected objects of {BadRow._fields}, got {row!r:.80}")
        known["examples"] = [BadRow(**example) for example in known.get("examples", [])]
        return cls(**known)

    def _examples(self) -> str:
        return "".join(f"\n  {bad.file}:{bad.line}: {bad.reason}" for bad in self.examples)

    def __str__(self) -> str:
        share = 100 * self.rows_bad / self.rows_read if self.rows_read else 0.0
        head = (
            f"{self.source or 'data'}: {self.rows_read} rows read, {self.rows_kept} kept, "
            f"{self.rows_bad} malformed ({share:.2f} %); {self.users} users, {self.items} items"
        )
        return head + self._examples() + "".join(f"\n  note: {note}" for note in self.notes)
