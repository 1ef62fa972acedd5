"""How many replicas of the model a Ray cluster runs, and what each of them gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flr.config import option

from .settings import Settings

_MOST = 10_000  # replicas
#: Requests beside those of the engine's queue that a replica may hold: items, info, reloads.
_ASIDE = 64


@dataclass
class Scaling:
    """Where replicas run, and how many. ValueError for a value out of range."""

    ray: str | None = option(
        None,
        "Address of a Ray cluster (auto, local, HOST:PORT, ray://HOST:PORT) whose replicas run the model; this process "
        "is their front. Default: the model runs in this process.",
    )
    app: str = option("flr", "Name of the application in the cluster; what runs there under that name is replaced.")
    replicas: int | None = option(None, "Replicas of the model. Default: 1, or what the next two say.")
    min_replicas: int | None = option(None, "With max_replicas: as many replicas as the load needs, these at least.")
    max_replicas: int | None = option(None, "With min_replicas: as many replicas as the load needs, these at most.")
    target_requests: float | None = option(
        None, "Requests at a time that one replica shall have, beyond which there are more. Default: max_batch_size."
    )
    replica_gpus: float | None = option(None, "GPUs of a replica. Default: 1 with --device cuda, else none.")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("replicas", 1, _MOST),
            ("min_replicas", 1, _MOST),
            ("max_replicas", self.min_replicas or 1, _MOST),
            ("target_requests", 0.01, 100_000),
            ("replica_gpus", 0, 64),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {value!r}")
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas: expected max_replicas beside it, got one of the two")
        if self.replicas is not None and self.min_replicas is not None:
            raise ValueError("replicas: expected either that or min_replicas and max_replicas, got both")
        if self.target_requests is not None and self.min_replicas is None:
            raise ValueError("target_requests: expected min_replicas and max_replicas beside it, got neither")
        if self.ray is None:
            given = ("replicas", "min_replicas", "replica_gpus")
            if some := [name for name in given if getattr(self, name) is not None]:
                raise ValueError(f"{some[0]}: expected --ray ADDRESS beside it, got none")

    def options(self, settings: Settings) -> dict[str, Any]:
        """Of ``ray.serve.deployment``, for a replica under these settings."""
        gpus = self.replica_gpus if self.replica_gpus is not None else float((settings.device or "").startswith("cuda"))
        found: dict[str, Any] = {
            "max_ongoing_requests": settings.max_queue + settings.max_batch_size + _ASIDE,
            "max_queued_requests": settings.max_queue,
            "health_check_period_s": 2,
            "health_check_timeout_s": 30,
            "graceful_shutdown_timeout_s": settings.drain_timeout_s,
            "ray_actor_options": {"num_cpus": settings.threads or 1, "num_gpus": gpus},
        }
        if self.min_replicas is None:
            return found | {"num_replicas": self.replicas or 1}
        target = self.target_requests or settings.max_batch_size
        numbers = {"min_replicas": self.min_replicas, "max_replicas": self.max_replicas}
        return found | {"autoscaling_config": numbers | {"target_ongoing_requests": target}}
