"""Capturing CUDA graphs, of decoding and of training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


def graphs_allowed() -> bool:
    """Whether the environment lets graphs be used, those of decoding and of training."""
    return os.environ.get("FLR_CUDA_GRAPHS", "1") != "0"


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph``; a capture that fails leaves the random numbers of the device as they were.

    Without this its generator would refuse every later draw, since it takes the capture for one that goes on.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


def cause(error: BaseException) -> str:
    """A line that says what was raised and, since the end of a failed capture raises again, what was raised first."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    said = [(str(x).splitlines() or [""])[0] or type(x).__name__ for x in (error, first)]
    return said[0] if first is error or said[0] == said[1] else f"{said[0]} (after {type(first).__name__}: {said[1]})"
