"""From a log in memory to recommendations in a table of the same kind."""

import pyarrow as pa
import pytest

from flr.data.frames import KINDS, kind_of, to_frame
from flr.recommend import Recommendation, Recommendations, UserHistories
from tests.helpers.comparisons import assert_same_recommendations
from tests.helpers.models import build_recommender

LOG = pa.table(
    {
        "client": [7, 5, 7, 5, 9],
        "item": ["item_3", "item_9", "item_1", "item_2", "item_4"],
        "time": [3, 1, 2, 2, 1],
    }
)


@pytest.fixture(scope="module")
def recommender():
    return build_recommender()


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_in_recommendations_out(recommender, kind):
    if kind != "pyarrow":
        pytest.importorskip(kind)
    log = to_frame(LOG, kind)
    histories = UserHistories.from_frame(log, user="client")
    assert histories.users.to_pylist() == [7, 5, 9]
    assert list(histories) == [["item_1", "item_3"], ["item_9", "item_2"], ["item_4"]]
    found = recommender.recommend(histories, k=3)
    for ours, plain in zip(found, recommender.recommend(list(histories), k=3), strict=True):
        assert_same_recommendations(ours, plain)
    table = found.to_frame(like=log)
    assert kind_of(table) == kind
    rows = (table if kind == "pyarrow" else found.to_frame("pyarrow")).to_pylist()
    assert [row["client"] for row in rows] == [7, 7, 7, 5, 5, 5, 9, 9, 9]
    assert [row["rank"] for row in rows] == [1, 2, 3] * 3
    assert [(row["item_id"], row["title"], row["score"]) for row in rows] == [
        (r.item_id, r.title, r.score) for items in found for r in items
    ]


def test_slices_keep_their_users(recommender):
    histories = UserHistories.from_frame(LOG, user="client")
    last = histories[1:]
    assert (list(last), last.users.to_pylist(), last.column) == (list(histories)[1:], [5, 9], "client")
    assert recommender.recommend(last, k=1).to_frame("pyarrow")["client"].to_pylist() == [5, 9]


def test_without_users_a_row_is_the_place_of_its_history(recommender):
    found = recommender.recommend([["item_1"], []], k=2)
    assert found.to_frame("pyarrow")["row"].to_pylist() == [0, 0, 1, 1]
    assert Recommendations().to_frame("pyarrow").num_rows == 0


def test_errors():
    with pytest.raises(ValueError, match=r"users: expected one a history \(1\), got 2"):
        UserHistories([["x"]], pa.array([1, 2]))
    with pytest.raises(ValueError, match=r"frame: expected a column user_id or user"):
        UserHistories.from_frame(LOG)
    named = Recommendations([[Recommendation("x", "X", 0.0, 0, [], [], None)]], pa.array([1]), "title")
    with pytest.raises(ValueError, match="user: expected a column that is none of"):
        named.to_frame("pyarrow")
