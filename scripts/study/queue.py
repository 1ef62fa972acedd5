"""The order of a study's jobs: priorities, a choice between settings on the way, a deadline, what is done already.

A list of jobs is ``{"settings": {name: {"argv": […], "cost": 1.0}}, "jobs": [job, …]}``. A job has a ``name``, a
``priority`` (lower first), ``argv`` of ``flr sft``, a ``seed``, ``evaluate`` (see :mod:`.job`), a relative ``cost``,
``memory`` of the device in GB, and ``tags`` that come back with its result. ``setting`` names what is added to its
``argv``, ``last`` comes behind that. Jobs with ``tune`` true try settings for a ``variant``; those with setting
``"best"`` wait for what is chosen, those with ``after_tuning`` true for the end of all trials.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

_ROLL = 12 << 20  # bytes of a file of ranks before the next one is begun
_RESULTS = "results.jsonl"


class Results:
    """What jobs gave, in a folder: a line of ``results.jsonl`` a job, and ranks in files that are appended to.

    A study that is killed leaves every job that had ended; the next one in the folder goes on from there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.done = {line["name"]: line for line in read_results(folder) if "error" not in line}

    def add(self, line: dict[str, Any], ranks: dict[str, np.ndarray]) -> None:
        """Keep a job's result."""
        if ranks:
            number = 0
            while (file := self.folder / f"ranks-{number}.bin").is_file() and file.stat().st_size > _ROLL:
                number += 1
            block = io.BytesIO()
            np.savez_compressed(block, **{name: np.minimum(x, 32767).astype(np.int16) for name, x in ranks.items()})
            with file.open("ab") as out:
                place = [file.name, out.tell(), len(block.getvalue())]
                out.write(block.getvalue())
            line = {**line, "ranks": place}
        with (self.folder / _RESULTS).open("a") as out:
            out.write(json.dumps(line) + "\n")
        if "error" not in line:
            self.done[line["name"]] = line


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``results.jsonl``; one that was cut by a kill is left out."""
    file, found = folder / _RESULTS, []
    for text in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def read_ranks(folder: Path, line: dict[str, Any]) -> dict[str, np.ndarray]:
    """int64 [rows] by name of a result's line; ranks above 32,767 stand as that, 0 for not found."""
    name, start, size = line["ranks"]
    with (folder / name).open("rb") as file:
        file.seek(start)
        with np.load(io.BytesIO(file.read(size))) as arrays:
            return {key: arrays[key].astype(np.int64) for key in arrays}


class Plan:
    """Which job is next.

    Args:
        lists: lists of jobs, as the module says; names are unique.
        results: of jobs that are done.
        seconds: until the deadline. tune_seconds: trials that have not begun by then are left out, for all alike.
        memory: of the device, in GB, that jobs may ask for together.
    """

    def __init__(
        self, lists: list[dict[str, Any]], results: Results, seconds: float, tune_seconds: float, memory: float = 70.0
    ) -> None:
        self.settings = {name: own for one in lists for name, own in one.get("settings", {}).items()}
        jobs = [job for one in lists for job in one["jobs"]]
        if len({job["name"] for job in jobs}) < len(jobs):
            raise ValueError("jobs: expected different names, got some twice")
        self.jobs = {job["name"]: job for job in jobs}
        self.waiting = sorted(
            (j for j in jobs if j["name"] not in results.done), key=lambda j: (j["priority"], -self.cost(j))
        )
        self.results, self.seconds, self.tune_seconds, self.memory = results, seconds, tune_seconds, memory
        self.running: dict[str, dict[str, Any]] = {}
        self.rates: list[float] = []  # seconds for a cost of 1

    def cost(self, job: dict[str, Any]) -> float:
        """Relative length of a job, half as long again where its setting is not chosen yet."""
        setting = job.get("chosen", job.get("setting"))
        factor = 1.5 if setting == "best" else self.settings.get(setting, {}).get("cost", 1.0)
        return job.get("cost", 1.0) * factor

    def choice(self, variant: str) -> str | None:
        """The setting with the best NDCG@10 on valid; None while a trial of the variant is to come.

        Where trials were left out for want of time, only settings count that every variant has tried.
        """
        tuning = [job for job in self.jobs.values() if job.get("tune")]
        if any(j.get("tune") and j["variant"] == variant for j in (*self.waiting, *self.running.values())):
            return None
        done = [job for job in tuning if job["name"] in self.results.done]
        variants = {job["variant"] for job in tuning}
        tried = {v: {job["setting"] for job in done if job["variant"] == v} for v in variants}
        shared = set.intersection(*tried.values()) if tried else set()
        busy = {j["variant"] for j in (*self.waiting, *self.running.values()) if j.get("tune")}
        allowed = tried.get(variant, set()) if busy else shared or tried.get(variant, set())
        own = [job for job in done if job["variant"] == variant and job["setting"] in allowed]
        if not own:
            return next(iter(self.settings))
        return max(own, key=lambda job: self.results.done[job["name"]]["metrics"]["valid"]["ndcg@10"])["setting"]

    def next(self, elapsed: float) -> dict[str, Any] | None:
        """A job to begin now, with its settings in ``argv``; None where none can."""
        if elapsed > self.tune_seconds:
            self.waiting = [job for job in self.waiting if not job.get("tune")]
        used = sum(job.get("memory", 3.0) for job in self.running.values())
        rate = float(np.median(self.rates)) if self.rates else 0.0
        tuning = any(job.get("tune") for job in (*self.waiting, *self.running.values()))
        for job in self.waiting:
            setting = job.get("setting")
            if setting == "best" and (setting := self.choice(job["variant"])) is None:
                continue
            if tuning and job.get("after_tuning"):
                continue
            made = {**job, "chosen": setting}
            too_long = elapsed + rate * self.cost(made) > self.seconds
            if too_long or (self.running and used + job.get("memory", 3.0) > self.memory):
                continue
            self.waiting.remove(job)
            extra = [] if setting is None else self.settings[setting]["argv"]
            made["argv"] = [*job["argv"], *extra, *job.get("last", [])]
            self.running[job["name"]] = made
            return made
        return None

    def ended(self, job: dict[str, Any], result: dict[str, Any], ranks: dict[str, np.ndarray], seconds: float) -> None:
        """Take a job's result."""
        del self.running[job["name"]]
        kept = {name: job[name] for name in ("name", "seed", "variant", "tags", "tune", "argv") if name in job}
        self.results.add({**kept, "setting": job["chosen"], "clock": round(seconds, 2), **result}, ranks)
        if "error" not in result:
            self.rates.append(seconds / self.cost(job))
