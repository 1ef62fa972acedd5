"""What is computed for everybody: model and options, those that decide the result and those that do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flr.config import ATTENTION, DTYPES, MAX_BEAMS, MAX_K

_MAX_SHARD = 1_000_000


@dataclass(frozen=True)
class BatchSettings:
    """Options of a run that decide its result; a run is continued only with the same.

    Attributes:
        k: items a user, 1 to 1000.
        num_beams: at least k are used.
        exclude_seen: leave out the history's items; a column of that name decides for its row.
        scoring: "full", "catalogue" or "auto".
        on_unknown: names that the catalogue lacks: "raise" (the shard fails) or "skip" (counted in the output).
        user: the column of users; None for user_id or user.
        history: the column of histories, lists of item ids or titles, oldest first.
        shard_size: users a shard at most, 1 to 1,000,000: what is computed again after a kill.
        threads: of a worker's CPU computations; sums depend on it in the last bits.
        device: "cpu" or "cuda".
        dtype: of the weights, "auto" as saved.
        attn_implementation: None for what transformers chooses.
    """

    k: int = 20
    num_beams: int = 20
    exclude_seen: bool = False
    scoring: str = "auto"
    on_unknown: str = "raise"
    user: str | None = None
    history: str = "history"
    shard_size: int = 10_000
    threads: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        limits = {"k": MAX_K, "num_beams": MAX_BEAMS, "shard_size": _MAX_SHARD, "threads": 1024}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise ValueError(f"{name}: expected an integer from 1 to {limit}, got {value!r}")
        choices: dict[str, tuple[Any, ...]] = {
            "scoring": ("auto", "full", "catalogue"),
            "on_unknown": ("raise", "skip"),
            "device": ("cpu", "cuda"),
            "dtype": DTYPES,
            "attn_implementation": (None, *ATTENTION),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")

    @property
    def beams(self) -> int:
        """Beams that are used."""
        return max(self.k, self.num_beams)

    def loading(self) -> dict[str, Any]:
        """Arguments of the model's loader."""
        given = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        return {name: value for name, value in given.items() if value not in ("auto", None)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
