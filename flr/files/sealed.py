"""Folders that tell whether they are what was written, files that move together, and a lock of a folder."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .whole import PathLike, read_json, sha256, write_json

MANIFEST = "manifest.json"


def seal_folder(folder: PathLike) -> None:
    """Write ``manifest.json`` into ``folder``: size and SHA-256 of the files below it, which reach the disk first.

    The manifest comes last, so a folder that has one was written to its end, and :func:`check_seal` tells whether it
    still is what was written.
    """
    root = Path(folder)
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST):
        files[path.relative_to(root).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        to_disk(path)
    write_json(root / MANIFEST, {"version": 1, "files": files})
    to_disk(root / MANIFEST)
    to_disk(root)


def check_seal(folder: PathLike) -> list[str]:
    """The names of the files that the manifest of ``folder`` lists.

    Raises:
        ValueError: there is no manifest, or a file is missing, or has another size or content than when it was sealed.
    """
    root = Path(folder)
    files = read_json(root / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{root / MANIFEST}: expected an object of files, got {type(files).__name__}")
    for name, entry in files.items():
        path = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{root / MANIFEST}: expected names inside the folder, got {name!r}")
        if not path.is_file():
            raise ValueError(f"{path}: expected a file, got none")
        if path.stat().st_size != entry.get("size"):
            raise ValueError(f"{path}: expected {entry.get('size')} bytes, got {path.stat().st_size}")
        if sha256(path) != entry.get("sha256"):
            raise ValueError(f"{path}: expected the content that was saved, got another one of the same size")
    return list(files)


def place_folder(source: PathLike, target: PathLike) -> None:
    """Rename a folder, on one disk; an older ``target`` is moved out of the way first, and deleted last."""
    target = Path(target)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.replace(target, aside)
    os.replace(source, target)
    to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def move_files(source: PathLike, target: PathLike, last: Sequence[str], owned: Sequence[str] = ()) -> None:
    """Move the files of one folder into another on the same disk so that no moment shows a mixture of old and new.

    Args:
        source: a folder; it is empty of files afterwards.
        target: a folder, which may hold files of the same names and others.
        last: names without which nobody reads ``target``. They are taken away first, the last one at once, and come
            last, in this order: until then ``target`` is refused.
        owned: patterns of names (``fnmatch``). What matches in ``target`` and is not in ``source`` is of the old state,
            and is deleted.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
    for name in names:
        to_disk(source / name)
    for name in reversed(last):
        (target / name).unlink(missing_ok=True)
    for path in list(target.iterdir()):
        if path.is_file() and path.name not in names and any(fnmatch.fnmatch(path.name, form) for form in owned):
            path.unlink()
    for name in [*(n for n in names if n not in last), *(n for n in last if n in names)]:
        if name in last:
            to_disk(target)  # what it vouches for is there before it
        os.replace(source / name, target / name)
    to_disk(target)


#: Descriptor and depth by process and lock file: a fork does not inherit such locks.
_held: dict[tuple[int, Path], tuple[int, int]] = {}


@contextmanager
def exclusive_folder(folder: PathLike, name: str = "output_dir") -> Iterator[None]:
    """Keep other processes out of ``folder``, which is made if need be, as long as the block or this process lives.

    Blocks of one process may be nested; ``name`` is what errors call the folder. The file ``.lock`` stays behind; it
    says nothing once nobody locks it.

    Raises:
        ValueError: another process is inside; names it.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    path = root.resolve() / ".lock"
    key = (os.getpid(), path)
    if key not in _held:
        _held[key] = (_lock(path, root, name), 0)
    handle, depth = _held[key]
    _held[key] = (handle, depth + 1)
    try:
        yield
    finally:
        handle, depth = _held.pop(key)
        if depth > 1:
            _held[key] = (handle, depth - 1)
        else:
            os.close(handle)  # which unlocks


def _lock(path: Path, folder: Path, name: str) -> int:
    import fcntl  # not on every system

    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # a lock of the process and not of the descriptor: workers that it has forked do not outlive it with the lock
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            wanted = "a folder that no other run writes to"
            raise ValueError(f"{name}: expected {wanted}, got {folder}, which process {holder} uses") from None
        raise OSError(error.errno, f"{error.strerror}: expected a disk with locks", str(path)) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # disks that cannot tell
            raise
    finally:
        os.close(handle)
