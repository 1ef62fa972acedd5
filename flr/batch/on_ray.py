"""Shards on a Ray cluster: a row of a Ray Data set is a shard, and an actor with a model turns it into a part.

What a shard is and where its part goes is the plan's, so a shard that Ray runs twice, because a node died, is the same
part again. Input and output lie where every node reaches them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .plan import Plan, Shard
from .worker import Outcome, Worker

_TRIES = 2
_NO_RESULT = f"no result from Ray: {_TRIES} actors died of it, or its node was lost; Ray's log says which"


def on_ray(plan: Plan, shards: Sequence[Shard], workers: int | None, address: str) -> Iterator[Outcome]:
    """The outcome of every shard, as they are done.

    Args:
        plan: of the run.
        shards: those to compute.
        workers: actors at most; None for as many as the cluster has GPUs, or CPUs by ``threads``.
        address: of the cluster, as ``ray.init`` takes it; "local" starts one on this machine.

    Raises:
        ModuleNotFoundError: Ray is not installed: ``pip install 'flr[ray]'``.
        ConnectionError: no cluster at that address.
        ValueError: an actor could not load the model; says why.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        resources, threads = ray.cluster_resources(), plan.settings.threads
        gpu = plan.settings.device == "cuda"
        most = int(resources.get("GPU", 0)) if gpu else int(resources.get("CPU", 1)) // threads
        actors = min(workers or max(most, 1), len(shards))
        context = DataContext.get_current()
        context.max_errored_blocks = -1  # a shard without a result is told below
        context.enable_progress_bars = False
        rows = from_items([{"place": place} for place in range(len(shards))], override_num_blocks=len(shards))
        done = rows.map_batches(
            _Actor,
            fn_constructor_args=(plan, list(shards)),
            batch_size=1,
            compute=ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=threads,
            num_gpus=1 if gpu else 0,
            max_task_retries=_TRIES - 1,
            max_restarts=-1,
        )
        open_shards = {shard.number for shard in shards}
        for row in done.iter_rows():
            if row["broken"]:
                raise ValueError(row["reason"])
            open_shards.discard(int(row["shard"]))
            yield Outcome(int(row["shard"]), int(row["users"]), float(row["seconds"]), row["reason"] or None)
        for number in sorted(open_shards):
            yield Outcome(number, 0, 0.0, _NO_RESULT)
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A worker in an actor; one that cannot be made says why with its first shard, since Ray would try for ever."""

    def __init__(self, plan: Plan, shards: list[Shard]) -> None:
        from transformers.utils import logging as said

        said.disable_progress_bar()
        self.shards, self.broken = shards, ""
        try:
            plan.check_here()
            self.worker = Worker(plan, plan.settings.device)
        except Exception as error:
            self.broken = f"worker: {type(error).__name__}: {error}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        outcomes = []
        for place in batch["place"].tolist():
            shard = self.shards[place]
            outcomes.append(Outcome(shard.number, 0, 0.0, self.broken) if self.broken else self.worker(shard))
        names = ("shard", "users", "seconds")
        columns: dict[str, list[Any]] = {name: [getattr(one, name) for one in outcomes] for name in names}
        reasons = [one.reason or "" for one in outcomes]
        return {**columns, "reason": reasons, "broken": [bool(self.broken)] * len(outcomes)}
