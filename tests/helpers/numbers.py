"""Options that are numbers, and values that they do not take."""

from __future__ import annotations

import math
import typing
from typing import Any

from flr.config import Numbers


def is_number(options: type, name: str) -> bool:
    """Whether the annotation of a field is ``int``, ``float`` or a union with one of them."""
    hint = typing.get_type_hints(options)[name]
    return bool({hint, *typing.get_args(hint)} & {int, float})


def outside(taken: Numbers) -> list[Any]:
    """Values just out of the range, and some that are out of every range."""
    values: list[Any] = [math.nan, math.inf, -math.inf, "1", True]
    if taken.low > -math.inf:
        values += [taken.low - 1] + [taken.low] * (taken.ends[0] == "(")
    if taken.high < math.inf:
        values += [taken.high + 1] + [taken.high] * (taken.ends[1] == ")")
    values += [1.5] * taken.whole + [None] * (None not in taken.also)
    return [value for value in values if value not in taken.also]
