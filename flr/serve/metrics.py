"""What /metrics reports. Each app has a registry of its own, so that several may live in one process."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

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
        self.reloads = Counter("flr_reloads", "Reloads by result.", ["result"], registry=registry)
        self.generation = Gauge("flr_generation", "1 at the start, one more after every reload.", registry=registry)
        self.ready = Gauge("flr_ready", "1 while /ready says 200.", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
