"""Parts of an evaluation that are kept as they finish, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from flr.data import CSR, Interactions, RecProcessor
from flr.files import atomic_file

from .metrics import group_ids
from .ranks import Share

_PART_ROWS = 1024


class Ranked(NamedTuple):
    """What is kept of n rows."""

    by_item: np.ndarray  # int64 [n], ranks
    by_title: np.ndarray
    items: np.ndarray  # int64 [n, k]
    scores: np.ndarray


def in_parts(
    rank: Callable[[np.ndarray], Ranked],
    order: np.ndarray,
    batch_size: int,
    folder: Path | None,
    advance: Callable[[int], None],
    share: Share = Share(),  # noqa: B008 - a tuple
) -> Ranked:
    """``rank`` of all rows, taken in ``order``, given in the rows' own.

    Args:
        rank: of some rows.
        order: int64 [n], a permutation.
        batch_size: rows at a time, the same for any number of processes.
        folder: keeps parts that are finished, with their rows.
        advance: is told how many rows are done.
        share: of this process. Batches are dealt out in turn, so that all have long and short rows, and every process
            gets all results.
    """
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    own, many = share.dealt(batches), max(1, _PART_ROWS // batch_size)
    parts = []
    for start in range(0, len(own), many):
        some = own[start : start + many]
        name = f"{start * batch_size:09d}" + (f"-{share.rank}-of-{share.of}" if share.of > 1 else "")
        file = None if folder is None else folder / f"{name}.npz"
        rows = np.concatenate(some)
        part = None if file is None else _read_part(file, rows)
        if part is None:
            ranked = []
            for batch in some:
                ranked.append(rank(batch))
                advance(len(batch))
            part = _joined(ranked)
            if file is not None:
                with atomic_file(file) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, rows=rows, **part._asdict())
        else:
            advance(len(rows))
        parts.append(part)
    found = share.gathered(parts)
    dealt = [batch for number in range(share.of) for batch in Share(number, share.of).dealt(batches)]
    back = np.argsort(np.concatenate(dealt))
    return Ranked(*(x[back] for x in _joined([part for parts in found for part in parts])))


def _joined(parts: list[Ranked]) -> Ranked:
    return Ranked(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _read_part(file: Path, rows: np.ndarray) -> Ranked | None:
    """A finished part of these ``rows``; None where it is absent, was cut short or is of others.

    Which rows stand behind a name depends on the size of a batch, if there are several processes.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            known, part = arrays["rows"], Ranked(*(arrays[name] for name in Ranked._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return part if np.array_equal(known, rows) and all(len(x) == len(rows) for x in part) else None


def _state_checksums(model: nn.Module) -> Iterator[bytes]:
    """Name, shape, dtype and integer sums of every weight's bits, and the configuration: what the outputs depend on."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        yield config.to_json_string(use_diff=False).encode()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            bits = tensor.detach().contiguous().flatten().view(integers)
            sums = [int(bits[i::7].sum(dtype=torch.int64)) for i in (0, 3)] + [int(bits.sum(dtype=torch.int64))]
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode()


def fingerprint(
    settings: Mapping[str, Any],
    model: nn.Module,
    processor: RecProcessor,
    prompts: CSR,
    interactions: Interactions,
    order: np.ndarray,
) -> str:
    """A name for parts that settings, weights, items and rows with their prompts, in this order, would give again."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12)
    for chunk in _state_checksums(model):
        digest.update(chunk)
    codec, histories = processor.item_codec, interactions.histories
    inputs = (order, prompts.values, prompts.offsets, codec.tokens, codec.offsets, histories.values, histories.offsets)
    for array in (*inputs, interactions.targets, group_ids(processor.catalogue.titles)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def remove_parts(folder: Path) -> None:
    """Delete the parts of all evaluations in ``folder``, and the folder if nothing of others is in it."""
    for kept in folder.glob("*"):
        if re.fullmatch(r"[0-9a-f]{24}", kept.name):  # a fingerprint
            shutil.rmtree(kept, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()
