"""Functions run in several gloo processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flr


def _rank(
    rank: int, source: str, environment: dict[str, str], function: Callable[..., Any], world: int, folder: str,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    assert flr.__file__ == source, f"expected flr of {source}, got that of {flr.__file__}"
    torch.set_num_threads(1)
    os.environ.clear()  # that of the server that forked this, as it was when it started
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # for accelerate, which finds the group made
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # freeing DDP beside gloo's threads hangs now and then; nothing is left to do


def in_processes(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` of every one of ``world`` processes, which share a process group.

    The function stands at the top of a module, and returns tensors in dicts, lists and tuples.
    """
    # a server that has imported everything forks: cheaper than imports in every process
    mp.get_context("forkserver").set_forkserver_preload(["tests.helpers.training"])
    given = (flr.__file__, dict(os.environ), function, world, str(folder), arguments)
    mp.start_processes(_rank, given, world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
