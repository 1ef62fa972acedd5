"""What ``flr sft`` and ``flr rl`` share: a run that continues where it was stopped, is saved, and sums itself up."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .parsing import console

if TYPE_CHECKING:
    from transformers import TrainingArguments


def resumes(args: TrainingArguments) -> bool:
    """Whether the run continues from a checkpoint: ``--resume_from_checkpoint auto`` (the default) or none."""
    if args.resume_from_checkpoint not in (None, "auto", "none"):
        raise ValueError(
            f"resume_from_checkpoint: expected auto (default) or none, got {args.resume_from_checkpoint!r}; "
            "runs continue from the last complete checkpoint in output_dir"
        )
    return args.resume_from_checkpoint != "none"


@contextlib.contextmanager
def training_run(trainer: Any, resume: bool) -> Iterator[str | None]:
    """Yield the checkpoint to continue from, if any; at the end of the block save the model and the trainer's state."""
    from flr.train import last_complete_checkpoint

    folder = str(trainer.args.output_dir)
    checkpoint = last_complete_checkpoint(folder) if resume else None
    if checkpoint is not None:
        console.print(f"continuing from {checkpoint}")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for --json
        yield checkpoint
    trainer.save_model(folder)
    trainer.save_state()


def summarise(args: TrainingArguments, facts: dict[str, Any], outcome: Any, results: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run: its folder, ``facts`` about it, steps and seconds of the trainer's ``outcome``, results."""
    length = {"steps": outcome.global_step, "seconds": outcome.metrics.get("train_runtime")}
    return {"output_dir": str(args.output_dir), **facts, **length, **results}
