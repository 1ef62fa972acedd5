"""Folders and files wherever fsspec reaches: this machine's disks, ``s3://``, ``gs://``, ``hf://``, ``memory://``, …"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from flr.files import atomic_file, to_disk

_MAX_JSON = 1 << 28  # bytes
_BLOCK = 1 << 22


class Place(NamedTuple):
    """A path on a file system of fsspec."""

    system: AbstractFileSystem
    path: str

    @classmethod
    def of(cls, url: str, name: str = "url") -> Place:
        """What a path or an URL names; ``name`` is what errors call it.

        Raises:
            ValueError: an unknown protocol.
            ImportError: a protocol whose package is not installed; its message names it.
        """
        try:
            return cls(*url_to_fs(url))
        except ValueError as error:
            raise ValueError(f"{name}: expected a path or an URL that fsspec knows, got {url!r} ({error})") from None

    def __str__(self) -> str:
        return self.path if self.local else str(self.system.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> Place:
        return Place(self.system, f"{self.path.rstrip('/')}/{name}")

    @property
    def local(self) -> bool:
        """Whether it lies on a disk of this machine, where renaming is atomic and locks are."""
        return isinstance(self.system, LocalFileSystem)

    def names(self) -> list[str]:
        """Names of what lies in the folder, none where there is no such folder."""
        self.system.invalidate_cache(self.path)
        if not self.system.isdir(self.path):
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self.system.ls(self.path, detail=False))

    @contextmanager
    def written(self) -> Iterator[Any]:
        """Yield a binary stream; what it was given is there under this name, whole, once the block ends without error.

        Readers of Parquet folders pass over the temporary name, which begins with a dot.
        """
        if self.local:
            with atomic_file(self.path) as file:
                with open(file, "wb") as stream:
                    yield stream
                to_disk(file)
            to_disk(Path(self.path).parent)
            return
        folder, _, name = self.path.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        try:
            with self.system.open(temporary, "wb") as stream:
                yield stream
            self.system.mv(temporary, self.path)
        except BaseException:
            if self.system.exists(temporary):
                self.system.rm(temporary)
            raise

    def write_json(self, value: Any) -> None:
        """Write ``value`` as indented JSON, whole or not at all."""
        text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        with self.written() as stream:
            stream.write(text.encode())

    def read_json(self) -> Any:
        """The value in a JSON file; ValueError naming the file where it is none, or longer than 256 MiB."""
        with self.system.open(self.path, "rb") as stream:
            content = stream.read(_MAX_JSON + 1)
        try:
            if len(content) > _MAX_JSON:
                raise ValueError("a longer one")
            return json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self}: expected JSON of at most {_MAX_JSON} bytes, got {error!s:.200}") from None

    def remove(self) -> None:
        """Delete the file, if there is one."""
        if self.system.exists(self.path):
            self.system.rm(self.path)

    def write_parquet(self, table: pa.Table) -> None:
        """Write one Parquet file with checksums, whole or not at all."""
        with self.written() as stream:
            pq.write_table(table, stream, compression="zstd", write_page_checksum=True)

    @contextmanager
    def parquet(self) -> Iterator[pq.ParquetFile]:
        """A Parquet file, open; ValueError naming it where it is none or damaged, in the block too."""
        try:
            with (
                self.system.open(self.path, "rb") as stream,
                pq.ParquetFile(stream, page_checksum_verification=True) as file,
            ):
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self}: expected a Parquet file, got {type(error).__name__}: {reason:.300}") from error

    def sha256(self) -> str:
        """SHA-256 of the file's content, in hexadecimal."""
        digest = hashlib.sha256()
        with self.system.open(self.path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()
