"""Replicas grow and shrink with the load as asked: Ray Serve's own decisions over made-up loads, without a cluster."""

from __future__ import annotations

import pytest

from tests.helpers import ray_cluster  # noqa: F401  sets Ray up before it is imported, and skips where it is missing

# isort: split

from ray.serve import autoscaling_policy
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_info import DeploymentInfo

from flr.serve import Settings
from flr.serve.ray import replicas
from flr.serve.scaling import Scaling

pytestmark = pytest.mark.ray
SETTINGS = Settings(model="runs/books", max_batch_size=8)
HOUR = 3600.0  # longer than Serve waits before it follows a load


class Load(DeploymentAutoscalingState):
    """What Serve's controller keeps of our deployment, with as many requests as a test says there are."""

    requests = 0.0

    def get_total_num_requests(self) -> float:
        return self.requests


def follow(monkeypatch, loads: list[float], start: int = 1, **options: float) -> list[int]:
    """Replicas after each of the loads, which last an hour, as the controller would have them."""
    clock = [0.0]
    monkeypatch.setattr(autoscaling_policy.time, "time", lambda: clock[0])
    deployment = replicas(SETTINGS, Scaling(ray="auto", **options))._bound_deployment
    place = DeploymentID("Replica", "flr")
    state = Load(place)
    info = DeploymentInfo(deployment._deployment_config, deployment._replica_config, 0, "job")
    now, found = state.register(info, start), []
    for load in loads:
        state.requests = load
        for _ in range(4):  # looks, a third of an hour apart
            state.update_running_replica_ids([ReplicaID(str(i), place) for i in range(now)])
            now = state.get_decision_num_replicas(now)
            clock[0] += HOUR / 3
        found.append(now)
    return found


def test_as_many_replicas_as_the_load_needs_between_the_two_bounds(monkeypatch):
    # eight requests at a time each (max_batch_size)
    loads = [0, 16, 17, 40, 400, 40, 9, 0]
    found = follow(monkeypatch, loads, min_replicas=2, max_replicas=6)
    assert found == [2, 2, 3, 5, 6, 5, 2, 2]
    assert follow(monkeypatch, [400, 0], min_replicas=1, max_replicas=1) == [1, 1]
    assert follow(monkeypatch, [24], start=9, min_replicas=1, max_replicas=4) == [3]
    assert follow(monkeypatch, [0], start=1, min_replicas=3, max_replicas=4) == [3]


def test_requests_that_a_replica_shall_have(monkeypatch):
    assert follow(monkeypatch, [16, 3, 40], min_replicas=1, max_replicas=12, target_requests=2) == [8, 2, 12]


def test_a_fixed_number_does_not_follow_any_load():
    deployment = replicas(SETTINGS, Scaling(ray="auto", replicas=3))._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment._deployment_config.autoscaling_config is None
