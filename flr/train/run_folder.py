"""The folder of a run: its checkpoints, which run they are of, and whether it is finished.

A checkpoint is written in a folder beside the others, sealed with a manifest (``flr.files.seal_folder``) and renamed;
so every ``checkpoint-N`` was written to its end, and damage shows. Each holds ``flr_run.json`` with the settings of its
run (:mod:`flr.train.settings`), and a finished run leaves one in its folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flr.files import PathLike, check_seal, read_json, write_json
from flr.model.folder import MODEL_FILES, UPDATE_NAME

from .settings import check_same

RUN_NAME, STATE_NAME = "flr_run.json", "trainer_state.json"
#: Where a save collects its files before they appear, below the folder that they are for.
STAGING = ".saving"
#: A model folder is read by these; a save takes them away first and writes them last.
MARKS = ("config.json", "processor_config.json")
#: What a run keeps beside its model for ``flr report``: what each factor likes, and the ranks on the valid split.
LIKES_NAME, VALID_NAME = "factors.json", "valid"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TRUE, _FALSE = ("true", "yes", "1"), ("none", "false", "no", "0", "")


@dataclass
class Start:
    """How a run begins.

    Attributes:
        checkpoint: to continue from; None for the beginning.
        finished: the folder holds the end of this very run.
        notices: lines for the user.
        summary: of a finished run; a caller sets it for the record.
    """

    checkpoint: str | None = None
    finished: bool = False
    notices: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def checkpoints(output_dir: PathLike) -> list[Path]:
    """The folders ``checkpoint-N``, the newest (largest N) first, whole or not."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def check_checkpoint(folder: PathLike) -> dict[str, Any]:
    """The trainer's state in a checkpoint that is whole, and whose best checkpoint is whole.

    Raises:
        ValueError: a file is missing or damaged, or was never saved (``--save_only_model``). Names it.
    """
    place = Path(folder)
    names = check_seal(place)
    for wanted in ("scheduler", "optimizer", "rng_state", "model", STATE_NAME, RUN_NAME):
        zero = wanted == "optimizer" and any(name.startswith("global_step") for name in names)  # DeepSpeed's
        if not zero and not any(wanted in name.split("/")[0] for name in names):
            raise ValueError(f"{place}: expected its {wanted}, without which a run cannot continue, got none")
    state = read_json(place / STATE_NAME)
    best = best_checkpoint(place.parent, state)
    if best is not None and best != place and recorded(place).get("load_best_model_at_end"):
        check_seal(best)
    return state


def best_checkpoint(output_dir: PathLike, state: Mapping[str, Any]) -> Path | None:
    """The folder in ``output_dir`` of the best checkpoint that a trainer's state names; it may be missing."""
    path = state.get("best_model_checkpoint")
    return None if not path else Path(output_dir) / Path(path).name


def newest_whole(output_dir: PathLike) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can continue from, if any, and a line for each newer one, which cannot be."""
    faults: list[str] = []
    for folder in checkpoints(output_dir):
        fault = _fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder} is left out: {fault}")
    return None, faults


def _fault(folder: Path) -> str | None:
    try:
        check_checkpoint(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def last_complete_checkpoint(output_dir: PathLike) -> str | None:
    """The newest ``checkpoint-*`` folder whose files are all there and as they were saved; None if there is none."""
    folder = newest_whole(output_dir)[0]
    return None if folder is None else str(folder)


def begin(output_dir: PathLike, settings: Mapping[str, Any], resume: str | bool | None, overwrite: bool) -> Start:
    """Where a run with these settings starts in ``output_dir``.

    Args:
        output_dir: the caller has it to itself (:func:`flr.files.exclusive_folder`).
        settings: of :func:`flr.train.settings.run_settings`.
        resume: None or "auto" continue from the newest whole checkpoint, if any; True from it, and there must be one;
            False or "none" start anew; a path continues from that checkpoint.
        overwrite: delete what runs have left in ``output_dir`` first.

    Raises:
        ValueError: ``output_dir`` or the checkpoint is of a run with other settings; names them. ``output_dir`` holds
            the model of an update. No whole checkpoint where one was asked for.
    """
    root = Path(output_dir)
    for rest in (root / STAGING, *root.glob(".checkpoint-*.old")):
        shutil.rmtree(rest, ignore_errors=True)
    if overwrite:
        _delete_run(root)
    if (root / UPDATE_NAME).is_file():
        raise ValueError(
            f"output_dir: expected a folder whose model is no update's, got {root} with {UPDATE_NAME}. "
            "Choose another output_dir, or delete what is there with --overwrite_output_dir true"
        )
    word = "auto" if resume is None else str(resume).lower()
    start = Start()
    if word not in ("auto", *_TRUE, *_FALSE):
        check_checkpoint(str(resume))
        check_same(resume, recorded(Path(str(resume))), settings)
        start.checkpoint = str(resume)
        return start
    newest, start.notices = newest_whole(root)
    finished = all((root / name).is_file() for name in (RUN_NAME, STATE_NAME, *MARKS))
    for place in [root] * finished + ([newest] if newest else []):
        check_same(place, recorded(place), settings)
    if word in _FALSE:
        return start
    if finished:
        start.finished, start.summary = True, read_json(root / RUN_NAME).get("summary", {})
    elif newest:
        start.checkpoint = str(newest)
    elif word in _TRUE:
        raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint in {root}, got none")
    return start


def record(folder: PathLike, settings: Mapping[str, Any], **more: Any) -> None:
    """Write the settings of a run, and ``more`` about it, into ``folder``."""
    write_json(Path(folder) / RUN_NAME, {"version": 1, "settings": settings, **more})


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint, or the end of a run, is of."""
    settings = read_json(folder / RUN_NAME).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / RUN_NAME}: expected settings, got {type(settings).__name__}")
    return settings


def _delete_run(root: Path) -> None:
    """Delete what a run writes, the record and the marks first, so that no rest passes for a model or a run."""
    kept = (LIKES_NAME, f"{VALID_NAME}/ranks.parquet", f"{VALID_NAME}/metrics.json")
    for name in (RUN_NAME, *reversed(MARKS), STATE_NAME, UPDATE_NAME, *kept):
        (root / name).unlink(missing_ok=True)
    for folder in checkpoints(root):
        discard(folder)
    for form in MODEL_FILES:
        for path in root.glob(form):
            path.unlink()


def discard(folder: Path) -> None:
    """Delete a checkpoint: it stops being one at once."""
    dying = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(dying, ignore_errors=True)
    os.replace(folder, dying)
    shutil.rmtree(dying, ignore_errors=True)


def rotate(output_dir: PathLike, limit: int | None, keep: set[str]) -> None:
    """Delete checkpoints until ``limit`` are left, the oldest first; those with a name in ``keep`` stay.

    One that lies past the newest of ``keep`` is damaged or of a future that did not happen: it goes before the others.
    """
    found = checkpoints(output_dir)[::-1]
    if not limit or limit < 0:
        return
    now = max((_step(folder) for folder in found if folder.name in keep), default=0)
    order = sorted(found, key=lambda folder: (_step(folder) <= now, _step(folder)))
    left = len(order)
    for folder in order:
        if left > max(limit, len(keep)) and folder.name not in keep:
            discard(folder)
            left -= 1


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Errors of writing, in whatever form the libraries raise them, as one OSError that names ``place``."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, RuntimeError) and not any(f.filename.endswith("torch/serialization.py") for f in frames):
            raise
        text = str(error).strip().split("\n")[0]
        raise OSError(f"{place}: expected to write it whole, got {text}") from error


def in_main(args: Any, function: Callable[[], Any]) -> Any:
    """What ``function`` returns or raises in the main process, in every process of a training with these arguments."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if args.world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
