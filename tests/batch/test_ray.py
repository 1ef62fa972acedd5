"""The same lists from a Ray cluster: two nodes, simulated on this machine, one of which is lost."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine starts a node slowly; read on import
pytest.importorskip("ray", reason="needs the extra ray")

import pyarrow as pa
from ray.cluster_utils import Cluster

from flr.batch import BatchSettings, write_lists
from tests.batch.inputs import OPTIONS, USERS, histories, read_lists, save_model, write_histories

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = BatchSettings(**OPTIONS)


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


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
        if at.now and not lost:
            lost.append(cluster.second)
            cluster.remove_node(cluster.second, allow_graceful=False)

    done = write_lists(model, [source], str(tmp_path / "out"), SETTINGS, ray=cluster.address, progress=lose_a_node)
    assert lost
    assert done.failed == one.failed
    assert done.progress.now == USERS - 8
    assert read_lists(tmp_path / "out") == read_lists(tmp_path / "one")
    # the shard that failed is tried again, alone
    again = write_lists(model, [source], str(tmp_path / "out"), SETTINGS, workers=1, ray=cluster.address)
    assert (again.progress.before, again.progress.now, again.failed) == (USERS - 8, 0, one.failed)


def test_actors_that_cannot_load_the_model_say_why(cluster, tmp_path):
    table = histories().rename_columns(["user_id", "history", "allow", "deny", "exclude_seen", "where.colour"])
    model, source = save_model(tmp_path / "model"), write_histories(tmp_path / "in", table)
    with pytest.raises(ValueError, match=r"where.colour': expected one of the catalogue's attributes \(interest"):
        write_lists(model, [source], str(tmp_path / "out"), SETTINGS, ray=cluster.address)
