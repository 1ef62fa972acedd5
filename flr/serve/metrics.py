"""What /metrics reports. Each app has a registry of its own, so that several may live in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

#: What only engines measure; the rest of an application's metrics is about requests and connections.
_OF_ENGINES = ("flr_queue_", "flr_batch_", "flr_dropped", "flr_reloads", "flr_generation", "process_")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and histograms of one app."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("flr_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        times = functools.partial(Histogram, registry=registry, buckets=_SECONDS)
        self.seconds = times("flr_request_seconds", "From the first byte to the answer.", ["path"])
        self.queue_seconds = times("flr_queue_seconds", "Time that a request waited for its batch.")
        self.batch_seconds = times("flr_batch_seconds", "Time that a batch took to compute.")
        self.batch_size = Histogram(
            "flr_batch_size", "Requests of a batch.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.queue_depth = Gauge("flr_queue_depth", "Requests that wait now.", registry=registry)
        self.in_flight = Gauge("flr_requests_in_flight", "Requests that are not answered yet.", registry=registry)
        self.connections = Gauge("flr_connections", "Connections that are open now.", registry=registry)
        #: reason: head, rest, unread, crowded, starved, refused or invalid
        self.ended = Counter(
            "flr_connections_ended", "Connections that the server ended.", ["reason"], registry=registry
        )
        #: reason: full, late or gone
        self.dropped = Counter("flr_dropped", "Requests that were not computed.", ["reason"], registry=registry)
        self.lost = Counter(
            "flr_replicas_lost", "Requests whose replica was lost before it answered.", registry=registry
        )
        self.reloads = Counter("flr_reloads", "Reloads by result.", ["result"], registry=registry)
        self.generation = Gauge("flr_generation", "1 at the start, one more after every reload.", registry=registry)
        self.ready = Gauge("flr_ready", "1 while /ready says 200.", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Families:
    """Metrics for ``generate_latest`` that were read elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def merged(front: Metrics, replicas: Mapping[str, str]) -> bytes:
    """The front's metrics, and those of the replicas' engines with the label ``replica``, in Prometheus' text format.

    Args:
        front: of the process that answers HTTP.
        replicas: what :meth:`Metrics.text` gave, by the replica's name.
    """
    families = {family.name: family for family in text_string_to_metric_families(front.text().decode())}
    if replicas:
        families = {name: one for name, one in families.items() if not name.startswith(_OF_ENGINES[:3])}
    for replica, text in sorted(replicas.items()):
        for family in text_string_to_metric_families(text):
            if family.name.startswith(_OF_ENGINES):
                found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    return generate_latest(_Families([*families.values()]))
