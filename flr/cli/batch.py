"""``flr batch``: everybody's lists, offline."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flr.config import option

from . import voice
from .parsing import REVISION, emit, parse
from .weights import WeightOptions

if TYPE_CHECKING:
    from rich.progress import Progress as Line

    from flr.batch import BatchSettings, Progress

ABOUT = (
    "Recommend for every row of Parquet files, once each, into a folder of Parquet files. Killed and started again "
    "with the same options it computes the missing shards only. See docs/scale.md."
)
_SHOWN = 20  # failed shards in the terminal; _failed.json lists all
_PAUSE = 30.0  # seconds between notes where there is no live line


@dataclass
class BatchOptions(WeightOptions):
    """For whom, where to, and by how many."""

    model: str = option("runs/sft", "Folder that flr sft wrote, or id of such a model on the Hub.")
    revision: str | None = option(None, REVISION)
    histories: list[str] = option(
        [],
        "Parquet files, folders of them, patterns; paths or URLs (s3://, gs://, …). A row a user, with columns user_id "
        "and history, and for filters allow, deny, exclude_seen, where.ATTRIBUTE.",
    )
    output: str | None = option(None, "Folder for the lists, a path or an URL: Parquet files, a shard each.")
    user: str | None = option(None, "Column of users. Default: user_id or user.")
    history: str = option("history", "Column of histories: lists of item ids or titles, oldest first.")
    k: int = option(20, "Items a user.")
    num_beams: int = option(20, "Beams, for codecs of several tokens an item; at least k are used.")
    exclude_seen: bool = option(False, "Never recommend an item of the history; a column exclude_seen goes before.")
    scoring: str = option("auto", "full, catalogue, or auto: what probabilities are normalised over.")
    on_unknown: str = option("raise", "Names that the catalogue lacks: raise (their shard fails) or skip (and count).")
    shard_size: int = option(10_000, "Users a shard, at most: what is lost at a kill, and held in memory by a worker.")
    workers: int | None = option(
        None,
        "Processes with a model each. Default: one a GPU, or 1 on a CPU; with --ray what the cluster has room for.",
    )
    threads: int = option(1, "CPU threads a worker computes with.")
    device: str = option("auto", "auto, cpu or cuda.")
    ray: str | None = option(None, "Address of a Ray cluster (auto, local, HOST:PORT, ray://HOST:PORT) that does it.")

    def settings(self) -> BatchSettings:
        """Those of the options that decide the result."""
        import torch

        from flr.batch import BatchSettings

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        same = ("user", "history", "k", "num_beams", "exclude_seen", "scoring", "on_unknown", "shard_size", "threads")
        given = {name: getattr(self, name) for name in (*same, "dtype", "attn_implementation")}
        return BatchSettings(**given, device=device)

    def processes(self, device: str) -> int | None:
        """Workers, None where the cluster decides."""
        if self.workers is not None or self.ray is not None:
            return self.workers
        import torch

        cores = os.cpu_count() or 1
        if device == "cpu" and cores > self.threads:
            voice.note(f"One worker with {self.threads} of {cores} CPU cores; --workers and --threads take more.")
        return max(torch.cuda.device_count(), 1) if device == "cuda" else 1


def main(argv: list[str]) -> int:
    options, rest = parse("batch", ABOUT, (BatchOptions,), argv)
    if not options.output:
        raise ValueError("output: expected a folder for the lists, got none")
    from rich.progress import MofNCompleteColumn, TextColumn

    from flr.batch import write_lists

    settings = options.settings()
    with voice.live(MofNCompleteColumn(), TextColumn("users · {task.fields[facts]}", markup=False)) as line:
        done = write_lists(
            options.model,
            options.histories,
            options.output,
            settings,
            revision=options.revision,
            workers=options.processes(settings.device),
            ray=options.ray,
            progress=_Teller(line),
        )
    at = done.progress
    before = f", {at.before:,} were done before" if at.before else ""
    voice.result(
        f"{options.output}: {at.now:,} of {at.users:,} users in {at.seconds:.1f} s, {at.rate:,.1f} users/s{before}."
    )
    for shard in done.failed[:_SHOWN]:
        rows = f"rows {shard['first_row']} to {shard['first_row'] + shard['rows'] - 1} of {shard['file']}"
        voice.fail(f"Shard {shard['shard']} failed ({rows}): {shard['reason']}")
    if done.failed:
        more = f"{options.output}/_failed.json lists them; the same command tries them again"
        voice.fail(f"{len(done.failed)} of {done.shards} shards failed, {at.failed:,} users; {more}.")
    emit(done.to_dict(), rest.json)
    return 1 if done.failed else 0


class _Teller:
    """Says how far a run is: on the live line, or now and then as a note."""

    def __init__(self, line: Line) -> None:
        self._line, self._said = line, time.monotonic()
        self._task = line.add_task("Lists", total=None, facts="")

    def __call__(self, at: Progress) -> None:
        failed = f", {at.failed:,} failed" if at.failed else ""
        facts = f"{at.rate:,.1f} users/s{failed}"
        self._line.update(self._task, total=at.users, completed=at.before + at.now + at.failed, facts=facts)
        if not voice.shows_progress() and time.monotonic() - self._said > _PAUSE:
            self._said = time.monotonic()
            voice.note(f"{at.before + at.now:,} of {at.users:,} users, {facts}")
