"""The same lists from a Ray cluster: two nodes, simulated on this machine, one of which is lost."""

from __future__ import annotations

import pyarrow as pa
import pytest

from flr.batch import BatchSettings, write_lists
from tests.batch.inputs import OPTIONS, USERS, histories, read_lists, save_model, write_histories
from tests.helpers import ray_cluster  # noqa: F401  skips where Ray is missing

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = BatchSettings(**OPTIONS)


def test_a_node_is_lost_and_the_lists_are_those_of_one_process(cluster, tmp_path):
    table = histories()
    names = table["history"].to_pylist()
    names[40] = ["nothing"]
    broken = table.set_column(1, "history", pa.array(names, pa.list_(pa.string())))
    model, source = save_model(tmp_path / "model"), write_histories(tmp_path / "in", broken)
    one = write_lists(model, [source], str(tmp_path / "one"), SETTINGS)
    assert [shard["shard"] for shard in one.failed] == [5]
    lost = []

    def lose_a_node(at):
        if at.now and cluster.lose():
            lost.append(at.now)

    done = write_lists(model, [source], str(tmp_path / "out"), SETTINGS, ray=cluster.address, progress=lose_a_node)
    assert lost
    assert done.failed == one.failed
    assert done.progress.now == USERS - 8
    assert read_lists(tmp_path / "out") == read_lists(tmp_path / "one")
    # the shard that failed is tried again, alone, and without Ray: the run is the same one
    again = write_lists(model, [source], str(tmp_path / "out"), SETTINGS)
    assert (again.progress.before, again.progress.now, again.failed) == (USERS - 8, 0, one.failed)


def test_actors_that_cannot_load_the_model_say_why(cluster, tmp_path):
    table = histories().rename_columns(["user_id", "history", "allow", "deny", "exclude_seen", "where.colour"])
    model, source = save_model(tmp_path / "model"), write_histories(tmp_path / "in", table)
    with pytest.raises(ValueError, match=r"where.colour': expected one of the catalogue's attributes \(interest"):
        write_lists(model, [source], str(tmp_path / "out"), SETTINGS, ray=cluster.address)
