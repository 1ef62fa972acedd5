"""The figures of contributions: an axis in nats, and the same numbers on the page, in the table and from the server."""

from __future__ import annotations

import itertools
import math

import pytest

from flr.cli.explain import say_effects
from flr.report.effects import effects, times
from tests.helpers.models import build_recommender
from tests.helpers.pages import Checker


def recommended(*contributions, base=-3.0):
    return {
        "item_id": "i", "title": "T", "contributions": list(contributions), "base_score": base,
        "score": base + sum(contributions), "factor_shares": [1 / len(contributions)] * len(contributions),
    }  # fmt: skip


def test_a_small_effect_looks_small_beside_a_large_one_and_alone():
    for others in ([], [recommended(2.0, 0.0)]):
        figures = effects([recommended(0.007, -0.001), *others])
        length = figures["ticks"][-1] - figures["ticks"][0]
        assert length >= 1
        assert figures["items"][0]["bars"][0].width == pytest.approx(0.007 / length)
        assert figures["items"][0]["bars"][0].width < 0.008


@pytest.mark.parametrize("contributions", [(0.7, -0.2, 0.1), (4.0, 0.3, -9.0), (-0.4, -0.5, -0.1), (0.0, 0.0, 0.0)])
def test_bars_stand_on_the_axis_where_their_nats_are(contributions):
    figures = effects([recommended(*contributions)])
    ticks, bars = figures["ticks"], figures["items"][0]["bars"]
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert 0 in ticks
    length = ticks[-1] - ticks[0]
    nats = [(ticks[0] + length * bar.left, ticks[0] + length * (bar.left + bar.width)) for bar in bars]
    ups = [span for span, c in zip(nats, contributions, strict=True) if c > 0]
    downs = [span for span, c in zip(nats, contributions, strict=True) if c < 0]
    assert sum(b - a for a, b in ups) == pytest.approx(sum(c for c in contributions if c > 0))
    assert sum(b - a for a, b in downs) == pytest.approx(-sum(c for c in contributions if c < 0))
    for spans, end in ((sorted(ups), 0), (sorted(downs, reverse=True), 1)):
        if spans:  # from zero outwards, without gaps
            assert spans[0][end] == pytest.approx(0, abs=1e-9)
            assert all(one[1 - end] == pytest.approx(next_[end]) for one, next_ in itertools.pairwise(spans))
    assert all(bar.left >= -1e-9 and bar.left + bar.width <= 1 + 1e-9 for bar in bars)


def test_the_total_stands_beside_the_score_without_factors():
    one = effects([recommended(0.5, -0.2)])["items"][0]
    assert one["total"] == pytest.approx(0.3)
    assert one["base_score"] + one["total"] == pytest.approx(one["score"])
    assert one["total_times"] == times(0.3) == "×1.3 as likely"


def test_a_notice_where_factors_barely_matter_and_only_there():
    assert effects([recommended(0.03, -0.01)])["notice"].endswith("by more than 4.1 %.")
    assert effects([recommended(0.03, -0.01), recommended(0.3, 0.0)])["notice"] == ""
    assert effects([recommended(2.0, -2.0)])["notice"] == ""  # they matter, though they cancel each other
    assert effects([]) is effects([{"contributions": []}]) is None


def test_the_page_and_the_command_show_the_same_figures(tmp_path, capsys):
    explanation = build_recommender().explain(["item_3", "item_7"], k=4)
    explanation.html(tmp_path / "why.html")
    shown = " ".join(" ".join(Checker((tmp_path / "why.html").read_text()).text).split())
    say_effects(explanation)
    table = capsys.readouterr().out
    figures = explanation.effects()
    for item, one in zip(explanation.recommendations, figures["items"], strict=True):
        row = next(line for line in table.splitlines() if line.startswith(f"{item.item_id} "))
        for text in (f"{item.score:.3f}", f"{item.base_score:.3f}", f"{one['total']:+.3f}", times(one["total"])):
            assert text in row
            assert text in shown
        for k, c in enumerate(item.contributions):
            assert f"{c:+.3f}" in row
            assert f"F{k + 1} {c:+.3f}, {times(c)}" in shown
        assert math.isclose(one["total"], sum(item.contributions))
    assert figures["notice"] in shown
    assert figures["notice"] in table
    quiet = {**explanation.to_dict(), "recommendations": [recommended(0.01, 0.0, 0.0)]}
    from flr.report.explanation import write_explanation

    write_explanation(quiet, tmp_path / "quiet.html")
    assert "The factors barely matter here" in (tmp_path / "quiet.html").read_text()
