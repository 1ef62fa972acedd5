"""Ranges of numbers, and those of a thought's configuration."""

import math
from fractions import Fraction

import numpy as np
import pytest

from flr.config import COUNT, FLR_NUMBERS, NOT_NEGATIVE, POSITIVE, SEED, SHARE, FLRConfig, Numbers
from tests.helpers.numbers import is_number, outside

RANGES = [
    (NOT_NEGATIVE, "a number >= 0", [0, 1e308, np.float32(2), 10**400, Fraction(1, 3)], [-1e-300, None, "1", True]),
    (POSITIVE, "a positive number", [1e-300], [0, -0.0]),
    (POSITIVE.or_none, "None or a positive number", [None, 1], [0, False]),
    (SHARE, "a number in [0, 1)", [0, 0.999], [1, -0.1]),
    (Numbers(0, 1, "(]"), "a number in (0, 1]", [1, 0.1], [0, 1.1]),
    (COUNT, "an integer >= 1", [1, np.int64(7)], [0, 1.0, 2.5, np.float64(3)]),
    (SEED, "an integer from 0 to 4294967295", [0, 2**32 - 1], [-1, 2**32]),
    (Numbers(1, whole=True, also=(-1,)), "-1 or an integer >= 1", [-1, 1], [0, -2, None]),
    (Numbers(whole=True), "an integer", [-5], [0.5]),
    (Numbers(), "a finite number", [-5.5], [None]),
]


@pytest.mark.parametrize(("taken", "text", "inside", "out"), RANGES, ids=[text for _, text, _, _ in RANGES])
def test_a_range_takes_what_it_says(taken, text, inside, out):
    assert str(taken) == text
    assert [value for value in inside if not taken.takes(value)] == []
    assert [value for value in [*out, math.nan, math.inf, -math.inf] if taken.takes(value)] == []


def test_every_float_of_a_thought_has_a_range():
    counts = {"num_factors", "factor_size", "num_refinements", "num_thoughts", "thought_token_id"}
    assert {name for name in FLRConfig.__dataclass_fields__ if is_number(FLRConfig, name)} - counts == set(FLR_NUMBERS)


@pytest.mark.parametrize("name", FLR_NUMBERS)
def test_a_thought_of_other_numbers_is_refused_by_name(name):
    for value in outside(FLR_NUMBERS[name]):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as error:
            FLRConfig(**{name: value})
        assert str(error.value) == f"{name}: expected {FLR_NUMBERS[name]}, got {value!r}"
