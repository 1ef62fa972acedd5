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

_TRIES = 2  # passes without any result


def on_ray(plan: Plan, shards: Sequence[Shard], workers: int | None, address: str) -> Iterator[Outcome]:
    """The outcome of every shard, as they are done.

    Shards that a pass over the cluster left without a result, because an actor or a node died, go into another pass,
    until two passes have given nothing: retries by Ray would take healthy shards along with an actor that is lost, or
    try a shard that kills its actor for ever.

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
    from ray.exceptions import RayError

    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        waiting, fruitless = {shard.number: shard for shard in shards}, 0
        reason = "its actor or node was lost; Ray's log says how"
        while waiting and fruitless < _TRIES:
            before = len(waiting)
            try:
                for row in _rows(plan, list(waiting.values()), workers):
                    if row["broken"]:
                        raise ValueError(row["reason"])
                    if waiting.pop(int(row["shard"]), None) is not None:
                        yield Outcome(
                            int(row["shard"]), int(row["users"]), float(row["seconds"]), row["reason"] or None
                        )
            except RayError as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            fruitless = fruitless + 1 if len(waiting) == before else 0
        for number in sorted(waiting):
            yield Outcome(number, 0, 0.0, f"no result from Ray in {_TRIES} passes: {reason}")
    finally:
        if started:
            ray.shutdown()


def _rows(plan: Plan, shards: list[Shard], workers: int | None) -> Iterator[dict[str, Any]]:
    """One pass: a row for every shard that an actor came to the end of."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    resources, threads = ray.cluster_resources(), plan.settings.threads
    gpu = plan.settings.device == "cuda"
    most = int(resources.get("GPU", 0)) if gpu else int(resources.get("CPU", 1)) // threads
    actors = min(workers or max(most, 1), len(shards))
    context = DataContext.get_current()
    context.max_errored_blocks = -1  # a shard without a result does not end the pass
    context.enable_progress_bars = False
    rows = from_items([{"place": place} for place in range(len(shards))], override_num_blocks=len(shards))
    done = rows.map_batches(
        _Actor,
        fn_constructor_args=(plan, shards),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=threads,
        num_gpus=1 if gpu else 0,
        max_task_retries=0,
        max_restarts=-1,
    )
    yield from done.iter_rows()


class _Actor:
    """A worker in an actor; one that cannot be made says why with its first shard, since Ray would try for ever."""

    def __init__(self, plan: Plan, shards: list[Shard]) -> None:
        from transformers.utils import logging as said

        said.disable_progress_bar()
        self.shards, self.broken = shards, ""
        try:
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
