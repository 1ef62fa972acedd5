"""Where the files of a data set lie: one file, a folder or a zip archive, plain or gzipped, read as blocks of lines."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from flr.files import check_regular, shown

#: Called while a file is read: its name, bytes read so far, bytes in all (packed ones of a gzipped file).
Progress = Callable[[str, int, int], None]

MAX_LINE = 1 << 22  # bytes; the longest lines of public metadata take about 1 MB
_MAX_BYTES = 1 << 40  # unpacked; a gzip bomb ends here
_MAX_MEMBERS = 100_000
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True)
class SourceFile:
    """A file on disk, or a member of a zip archive."""

    path: Path
    member: str | None = None
    progress: Progress | None = None

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return self.path.name if self.member is None else self.member.rpartition("/")[2]

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked where they are gzipped; ValueError, naming the file, where they are not whole."""
        try:
            if self.member is None:
                check_regular(self.path, "a file")
                with open(self.path, "rb", buffering=0) as raw:
                    yield self._unpacked(raw, self.path.stat().st_size)
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as raw:
                    yield self._unpacked(raw, archive.getinfo(self.member).file_size)
        except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
            kind = "gzip" if self.member is None else "zip"
            raise ValueError(f"{self}: expected a whole {kind} file, got {error}") from error

    def beginning(self, size: int) -> bytes:
        """Its first bytes, unpacked."""
        with SourceFile(self.path, self.member).open() as stream:
            return stream.read(size)

    @property
    def is_parquet(self) -> bool:
        """Whether it is a Parquet file, by its first bytes."""
        return self.member is None and self.beginning(4) == _PARQUET

    @property
    def is_records(self) -> bool:
        """Whether it holds objects (JSON or Python dicts), by its first character."""
        return self.beginning(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"

    def _unpacked(self, raw: Any, size: int) -> IO[bytes]:
        stream = io.BufferedReader(_Counted(raw, self.name, size, self.progress), 1 << 20)
        return gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == _GZIP else stream  # type: ignore[return-value]


class Source:
    """The files of a folder, of a zip archive, or one file alone.

    Args:
        path: what to read.
        progress: see :data:`Progress`.

    Raises:
        ValueError: nothing there, or an archive that is damaged, encrypted or has very many members.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self.path = path
        self.is_file = False
        if path.is_dir():
            self.files = [SourceFile(file, None, progress) for file in sorted(path.iterdir()) if file.is_file()]
            return
        check_regular(path, "a file, a folder or a zip archive")
        if not zipfile.is_zipfile(path):
            self.is_file = True
            self.files = [SourceFile(path, None, progress)]
            return
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: expected a whole zip file, got {error}") from error
        if len(members) > _MAX_MEMBERS:
            raise ValueError(f"{path}: expected at most {_MAX_MEMBERS} members, got {len(members)}")
        if any(member.flag_bits & 1 for member in members):
            raise ValueError(f"{path}: expected an archive without a password, got an encrypted one")
        hidden = ("__MACOSX/", ".")
        names = [m.filename for m in members if not m.is_dir() and not m.filename.startswith(hidden)]
        self.files = [SourceFile(path, name, progress) for name in names]

    @property
    def name(self) -> str:
        """A name for the data set: that of the folder or file without suffixes."""
        return self.path.name if self.path.is_dir() else self.path.name.split(".")[0]

    def find(self, *patterns: str, without: Sequence[str] = ()) -> SourceFile | None:
        """The one file that the first fitting pattern, and none of ``without``, names; None for none.

        Raises:
            ValueError: several files fit.
        """
        for pattern in patterns:
            found = [file for file in self.files if fnmatchcase(file.name, pattern)]
            found = [file for file in found if not any(fnmatchcase(file.name, other) for other in without)]
            plain = [file for file in found if not file.name.endswith(".gz")]  # packed and unpacked lie side by side
            found = plain if len(plain) == 1 and len({file.name.removesuffix(".gz") for file in found}) == 1 else found
            if len(found) > 1:
                names = [file.name for file in found]
                raise ValueError(f"{self.path}: expected one file {pattern}, got {shown(names)}; name it")
            if found:
                return found[0]
        return None

    def names(self) -> str:
        """The first file names, for an error."""
        return shown([file.name for file in self.files[:10]])


def line_blocks(file: SourceFile) -> Iterator[tuple[int, bytes | None]]:
    """(number of the first line, whole lines of about ``MAX_LINE`` bytes) of a file, without a byte order mark.

    None stands for one line that is longer than that.
    """
    number, rest, read = 1, b"", 0
    with file.open() as stream:
        while True:
            chunk = stream.read(MAX_LINE)
            if not chunk:
                if rest:
                    yield number, rest
                return
            block = rest + (chunk if read else chunk.removeprefix(b"\xef\xbb\xbf"))
            read += len(chunk)
            if read > _MAX_BYTES:
                raise ValueError(f"{file}: expected at most {_MAX_BYTES} bytes unpacked, got more")
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            if end:
                yield number, block[:end]
                number += block.count(b"\n", 0, end)
            if len(rest) > MAX_LINE:
                yield number, None
                number += 1
                rest, skipped = _after_line(stream)
                read += skipped


def _after_line(stream: IO[bytes]) -> tuple[bytes, int]:
    """What was read past the end of the line that ``stream`` is in, and how many bytes were read."""
    read = 0
    while chunk := stream.read(MAX_LINE):
        read += len(chunk)
        if read > _MAX_BYTES:
            break
        end = chunk.find(b"\n") + 1
        if end:
            return chunk[end:], read
    return b"", read


class _Counted(io.RawIOBase):
    """A stream that says how much of it was read."""

    def __init__(self, raw: Any, name: str, size: int, progress: Progress | None) -> None:
        self._raw, self._name, self._size, self._progress = raw, name, size, progress
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        self._done += count
        if self._progress is not None:
            self._progress(self._name, self._done, self._size)
        return count
