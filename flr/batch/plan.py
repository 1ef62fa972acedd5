"""The plan of a run, ``_manifest.json`` of its output: by it a run is known again, and a shard is always the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import flr
from flr.files import shown
from flr.model.fingerprint import model_fingerprint

from .inputs import InputFile, find_files, look_at
from .settings import BatchSettings
from .storage import Place

MANIFEST, FAILED, DONE = "_manifest.json", "_failed.json", "_SUCCESS"
FORMAT = "flr-batch-1"
OUTPUTS = ("item_ids", "scores", "unknown")  # columns of a part behind that of the users
_KEY = b"flr.batch"  # of a part's Parquet metadata
_AT_ONCE = 16  # parts that are looked at


class Shard(NamedTuple):
    """Rows first..last-1 of an input file, and the number of the part that they become."""

    number: int
    file: int
    first: int
    last: int

    @property
    def users(self) -> int:
        """Rows of it."""
        return self.last - self.first


def _reads(url: str, output: str) -> bool:
    """Whether the files of ``output`` are histories of the folder ``url``."""
    folder, place = Place.of(url, "histories"), Place.of(output, "output")
    start = f"{folder.path.rstrip('/')}/"
    if type(folder.system) is not type(place.system) or not f"{place.path}/".startswith(start):
        return False
    return not any(part[:1] in (".", "_") for part in place.path[len(start) :].split("/"))


@dataclass(frozen=True)
class Plan:
    """All that decides the result of a run, and where things are.

    Attributes:
        model: folder or id on the Hub; ``revision`` of the latter.
        output: folder of the parts, a path or an URL.
        settings: options.
        files: the input in its order.
        user: name of the column of users.
        fingerprint: of the model, see :func:`flr.model.fingerprint.model_fingerprint`.
        versions: of the packages that compute.
    """

    model: str
    revision: str | None
    output: str
    settings: BatchSettings
    files: tuple[InputFile, ...]
    user: str
    fingerprint: str
    versions: dict[str, str]

    @classmethod
    def make(
        cls, model: str, histories: Sequence[str], output: str, settings: BatchSettings, revision: str | None = None
    ) -> Plan:
        """Look at model and input, all of whose bytes are read once.

        Raises:
            OSError, ValueError: no such model or files, or files of another form.
        """
        if not histories:
            raise ValueError("histories: expected Parquet files, got none")
        if holders := [url for url in histories if _reads(url, output)]:
            wanted = "a place that is not read, so that the run can be continued"
            raise ValueError(f"output: expected {wanted}, got {output} in the histories' folder {holders[0]}")
        found = model_fingerprint(model, **({} if revision is None else {"revision": revision}))
        files, user = look_at(find_files(histories), settings.user, settings.history)
        if user in OUTPUTS:
            raise ValueError(f"user: expected a column that is none of {', '.join(OUTPUTS)}, got {user!r}")
        return cls(model, revision, output, settings, tuple(files), user, found, versions())

    @property
    def shards(self) -> list[Shard]:
        """Every row of every file once, in order; a shard is of one file."""
        size = self.settings.shard_size
        shards: list[Shard] = []
        for index, file in enumerate(self.files):
            for first in range(0, file.rows, size):
                shards.append(Shard(len(shards), index, first, min(first + size, file.rows)))
        return shards

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued: contents, not where they lie."""
        return {
            "format": FORMAT,
            "model": self.fingerprint,
            "histories": [[file.sha256, file.rows] for file in self.files],
            "settings": self.settings.to_dict(),
            "versions": self.versions,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`identity`, which every part carries."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def part(self, shard: Shard) -> Place:
        """Where a shard's lists are written."""
        return Place.of(self.output, "output") / f"part-{shard.number:06d}.parquet"

    def metadata(self, shard: Shard) -> dict[bytes, bytes]:
        """By which a part is known as that of a shard."""
        return {_KEY: f"{self.digest} {shard.number}".encode()}

    def check_output(self) -> None:
        """See that the output is free, or of this run.

        Raises:
            ValueError: it is something else, or of a run with another input, model, settings or versions; names what
                differs.
        """
        folder = Place.of(self.output, "output")
        names = folder.names()
        wanted = "a free name or the folder of such a run"
        if folder.system.isfile(folder.path):
            raise ValueError(f"output: expected {wanted}, got the file {folder}")
        if MANIFEST in names:
            self._check(folder / MANIFEST)
        elif any(name != ".lock" and not name.startswith(f".{MANIFEST}.") for name in names):
            raise ValueError(f"output: expected {wanted}, got {folder} with {shown(names, 100)}")

    def begin(self) -> None:
        """Write the manifest, unless it is there; errors as those of :meth:`check_output`."""
        self.check_output()
        folder = Place.of(self.output, "output")
        if MANIFEST not in folder.names():
            folder.system.makedirs(folder.path, exist_ok=True)
            where = {"model": self.model, "revision": self.revision, "histories": [file.url for file in self.files]}
            (folder / MANIFEST).write_json({**self.identity(), "where": where, "shards": len(self.shards)})

    def _check(self, manifest: Place) -> None:
        found = manifest.read_json()
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{manifest}: expected a manifest of format {FORMAT}, got {shown(found, 100)}")
        mine = self.identity()
        told = f"output: expected the run that {manifest} is of"
        for name, what in (("model", "another model"), ("histories", "other histories")):
            if found.get(name) != mine[name]:
                raise ValueError(f"{told}, got {what} (their contents differ); choose another output")
        for name in ("settings", "versions"):
            told_of = found.get(name)
            theirs: dict[str, Any] = told_of if isinstance(told_of, dict) else {}
            keys = sorted({*theirs, *mine[name]})
            differ = [key for key in keys if theirs.get(key) != mine[name].get(key)]
            if differ:
                before = ", ".join(f"{key} {theirs.get(key)!r}" for key in differ)
                now = ", ".join(f"{key} {mine[name].get(key)!r}" for key in differ)
                raise ValueError(f"{told}, with {before}, got {now}; choose another output")

    def check_here(self) -> None:
        """ValueError where a worker, later and maybe on another machine, has another model or packages."""
        if versions() != self.versions:
            raise ValueError(f"versions: expected those of the plan, {self.versions}, got {versions()} at a worker")
        if model_fingerprint(self.model, **self.hub) != self.fingerprint:
            raise ValueError(f"model: expected the plan's, got another one in {self.model} where a worker loads it")

    @property
    def hub(self) -> dict[str, str]:
        """Arguments that say which model on the Hub is meant."""
        return {} if self.revision is None else {"revision": self.revision}

    def missing(self) -> list[Shard]:
        """Shards whose part is not there yet, whole and of this run."""
        names = set(Place.of(self.output, "output").names())

        def done(shard: Shard) -> bool:
            part = self.part(shard)
            if part.path.rpartition("/")[2] not in names:
                return False
            try:
                with part.parquet() as file:
                    metadata = file.metadata
                    own = (metadata.metadata or {}).get(_KEY) == self.metadata(shard)[_KEY]
                    return own and metadata.num_rows == shard.users
            except ValueError:
                return False

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [shard for shard, there in zip(self.shards, pool.map(done, self.shards), strict=True) if not there]

    def described(self, shard: Shard) -> dict[str, Any]:
        """A shard in words that a user knows, for lists of failures."""
        url = self.files[shard.file].url
        return {"shard": shard.number, "file": url, "first_row": shard.first, "rows": shard.users}


def versions() -> dict[str, str]:
    """Of the packages whose change may change a result."""
    import transformers

    return {"flr": flr.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
