"""A process that is killed, or whose disk is full, at a chosen operation on files."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_at(number: int, folder: Path) -> None:
    """SIGKILL this process before its ``number``-th change (from 1) of what lies below ``folder``.

    Files that torch and safetensors write do not pass Python; each is an operation that is killed half done.
    """
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    count = 0

    def died() -> bool:
        nonlocal count
        count += 1
        return count == number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not (args[2] or 0) & _WRITING:
            return
        if Path(os.path.abspath(args[0])).is_relative_to(folder) and died():
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            write(value, path, *args, **kwargs)
            if isinstance(path, str | os.PathLike) and Path(os.path.abspath(path)).is_relative_to(folder) and died():
                with open(path, "r+b") as file:
                    file.truncate(os.path.getsize(path) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    torch.save = torn(torch.save)
    safetensors.torch.save_file = torn(safetensors.torch.save_file)
    transformers.modeling_utils.safe_save_file = torn(transformers.modeling_utils.safe_save_file)
    sys.addaudithook(hook)  # stays for the life of the process


def bound_files(size: int) -> None:
    """From here on no file of this process grows past ``size`` bytes: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed_inside(work: Callable[[Callable[[], None]], Any], meanwhile: Callable[[int], None]) -> int:
    """Run ``work`` in a fork, which stays where it calls its argument until it is killed; its status.

    ``meanwhile`` is given the child's process id while the child is there.
    """
    read, write = os.pipe()

    def stay() -> None:
        os.write(write, b"x")
        signal.pause()

    def wait(child: int) -> None:
        os.read(read, 1)
        meanwhile(child)
        os.kill(child, signal.SIGKILL)

    return in_child(lambda: work(stay), wait)


def in_child(function: Callable[[], int | None], wait: Callable[[int], None] | None = None) -> int:
    """Run ``function`` in a fork of this process; its exit status, or minus the signal that ended it.

    ``wait`` is given the child's process id while it runs. An error is a status of 70, and printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = function() or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if wait is not None:
        wait(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
