"""A Ray cluster of two nodes, simulated on this machine. To be imported before Ray, which reads its settings then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine starts a node slowly
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers where other programs run
# processes of Ray's own that nothing here needs, two to three seconds of a processor each
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
pytest.importorskip("ray", reason="needs the extra ray")

import ray
from ray.cluster_utils import Cluster


class TwoNodes:
    """Nodes of a CPU each; a test may lose the second, and the next one finds another."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._second = None
        self.restore()

    @property
    def address(self) -> str:
        return self._cluster.address

    def restore(self) -> None:
        """A second node, if there is none."""
        if self._second is None:
            self._second = self._cluster.add_node(num_cpus=1)
            self._cluster.wait_for_nodes()

    def lose(self) -> bool:
        """Kill the second node; False where it was lost before."""
        if self._second is None:
            return False
        lost, self._second = self._second, None
        self._cluster.remove_node(lost, allow_graceful=False)
        return True


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The cluster, until the end of the block."""
    made = TwoNodes()
    try:
        yield made
    finally:
        ray.shutdown()
        made._cluster.shutdown()
