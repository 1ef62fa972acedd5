"""What a recommender answers, as plain values."""

from __future__ import annotations

import timeit
from dataclasses import asdict
from functools import partial

from tests.helpers.models import build_recommender


def test_plain_values_are_those_of_the_fields_and_cost_a_server_little():
    explanation = build_recommender().explain(["item_1", "item_2", "x"] * 50, k=30, on_unknown="skip")
    for whole in (explanation, *explanation.recommendations):
        plain, slow = whole.to_dict(), asdict(whole)
        if whole is explanation:
            arrays = {name: slow[name].tolist() for name in ("attention", "gates", "norms")}
            slow = {"variant": slow["variant"], "num_factors": 3, **slow, **arrays}
        assert plain == slow
        assert list(plain) == list(slow)
        plain["unknown" if whole is explanation else "contributions"].clear()
        assert whole.to_dict() == slow
        times = [min(timeit.repeat(work, number=20)) for work in (whole.to_dict, partial(asdict, whole))]
        assert times[0] < times[1] / 3
