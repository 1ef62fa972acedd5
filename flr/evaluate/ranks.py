"""Rows shared among the processes of ``torch.distributed``, and results brought together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist


class Share(NamedTuple):
    """One of ``of`` processes; 0 of 1 has everything.

    >>> Share(1, 3).dealt(["a", "b", "c", "d", "e"])
    ['b', 'e']
    """

    rank: int = 0
    of: int = 1

    @classmethod
    def own(cls) -> Share:
        """That of this process; 0 of 1 without a process group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def dealt(self, things: Sequence[Any]) -> list[Any]:
        """The own ones of ``things``, which are dealt out in turn."""
        return list(things[self.rank :: self.of])

    def gathered(self, own: Any) -> list[Any]:
        """What every process gives, in the order of ranks; every process calls this, and gets it."""
        if self.of == 1:
            return [own]
        found: list[Any] = [None] * self.of
        dist.all_gather_object(found, own)
        return found


@contextmanager
def launched() -> Iterator[Share]:
    """Within it the processes of a launcher (torchrun: ``RANK``, ``WORLD_SIZE``) are a process group, by gloo.

    Only results go from one to another, so gloo does on GPUs, too. A group that is there already is used and stays.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Share.own()
        return
    dist.init_process_group("gloo")
    try:
        yield Share.own()
        dist.barrier()  # the first process keeps the store of the group, and should not go before the others
    finally:
        dist.destroy_process_group()
