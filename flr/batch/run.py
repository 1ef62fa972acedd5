"""A run from its beginning or from where it was stopped, to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from flr.files import exclusive_folder

from .on_ray import on_ray
from .plan import DONE, FAILED, Plan, Shard
from .processes import in_processes, in_this_process
from .settings import BatchSettings
from .storage import Place
from .worker import Outcome


@dataclass(frozen=True)
class Progress:
    """How far a run is: users of the whole input, of those that were done before, are done now, or failed."""

    users: int
    before: int
    now: int
    failed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Users a second of this run."""
        return self.now / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        output: folder of the parts.
        shards: of the whole input.
        progress: at the end.
        failed: for each shard that failed: shard, file, first_row, rows, reason.
    """

    output: str
    shards: int
    progress: Progress
    failed: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        at = self.progress
        counts = {"users": at.users, "done_before": at.before, "done_now": at.now, "users_failed": at.failed}
        pace = {"seconds": round(at.seconds, 3), "users_per_second": round(at.rate, 3)}
        return {"output": self.output, "shards": self.shards, **counts, **pace, "failed": self.failed}


def write_lists(
    model: str,
    histories: Sequence[str],
    output: str,
    settings: BatchSettings,
    *,
    revision: str | None = None,
    workers: int | None = 1,
    ray: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Write everybody's lists as a folder of Parquet files; started again, a run that was stopped computes the rest.

    A part holds a row for each row of its shard, in the input's order: the user, ``item_ids`` list<string> and
    ``scores`` list<float32> best first, and ``unknown`` int32, names that were skipped. Lists may be shorter than k
    where filters leave fewer items.

    Args:
        model: folder, or id on the Hub.
        histories: Parquet files, folders, patterns; paths or URLs of fsspec. A row a user.
        output: folder, a path or an URL of fsspec.
        settings: options that decide the result.
        revision: of a model on the Hub.
        workers: processes of this machine (1: this one), or actors at most; None: as many as the cluster has room for.
        ray: address of a Ray cluster, as ``ray.init`` takes it; None for this machine.
        progress: called at the beginning and after every shard.

    Returns:
        What was done. Where shards failed, ``_failed.json`` beside the parts lists them; else ``_SUCCESS`` is there.

    Raises:
        OSError, ValueError: unusable arguments, model or input; an output that is of another run.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= 4096):
        raise ValueError(f"workers: expected an integer from 1 to 4096, got {workers!r}")
    plan = Plan.make(model, histories, output, settings, revision)
    plan.check_output()  # before a lock is left there
    folder = Place.of(output, "output")
    # object stores have no locks; two runs of one plan write the same parts there
    lock: AbstractContextManager[None] = exclusive_folder(folder.path, "output") if folder.local else nullcontext()
    with lock:
        plan.begin()
        shards, missing = plan.shards, plan.missing()
        users, began, now = sum(shard.users for shard in shards), time.monotonic(), 0
        before, failed = users - sum(shard.users for shard in missing), dict[int, str]()
        lost = 0
        if missing:
            (folder / DONE).remove()
        told = progress or (lambda at: None)
        told(Progress(users, before, 0, 0, 0.0))
        for outcome in _outcomes(plan, missing, workers, ray):
            now += outcome.users
            if outcome.reason is not None:
                failed[outcome.shard] = outcome.reason
                lost += shards[outcome.shard].users
            told(Progress(users, before, now, lost, time.monotonic() - began))
        reasons = [{**plan.described(shards[number]), "reason": failed[number]} for number in sorted(failed)]
        if reasons:
            (folder / FAILED).write_json(reasons)
        else:
            (folder / FAILED).remove()
            (folder / DONE).write_json({"users": users, "shards": len(shards)})
        return Summary(output, len(shards), Progress(users, before, now, lost, time.monotonic() - began), reasons)


def _outcomes(plan: Plan, shards: list[Shard], workers: int | None, ray: str | None) -> Iterator[Outcome]:
    if not shards:
        return iter(())
    if ray is not None:
        return on_ray(plan, shards, workers, ray)
    if workers == 1:
        return in_this_process(plan, shards)
    return in_processes(plan, shards, workers or 1)
